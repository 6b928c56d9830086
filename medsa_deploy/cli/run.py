"""medsa-deploy run: a bundle, images or a volume, and prompts → masks, listed in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import typer
from rich.markup import escape

from medsa_deploy import stages
from medsa_deploy.errors import UsageError
from medsa_deploy.runtime import BackendName
from medsa_deploy.stages.run.dicomweb import WebSeries

from . import console
from .console import out
from .options import (
    Backend,
    Bundle,
    Json,
    MaxMemory,
    MeasuredWindow,
    NoCudaGraphs,
    Precision,
    Threads,
    Threshold,
    Trusted,
    with_options,
)
from .values import parse_colours, parse_measured_window, parse_rows, parse_web_series

Count: TypeAlias = Callable[[str, int, int], None]
"""Called with a unit, how many are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of run."""

    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,LABEL]",
            help="A click, repeatable; label 1 foreground, 0 background; volume: X,Y,Z[,LABEL]",
        ),
    ] = None
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="A box, repeatable: one for each object; volume: X0,Y0,Z0,X1,Y1,Z1",
        ),
    ] = None
    prompts: Annotated[Path | None, typer.Option(help="Prompts of several structures, as JSON")] = (
        None
    )
    mask_input: Annotated[
        Path | None,
        typer.Option(help="Image: `.npy` logits of an earlier mask, from --save-logits"),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Mask: .png, .tif, .npy, .nii.gz; volume: .nii.gz, .nrrd, .seg.nrrd, .dcm, .npy; "
            "with --track: a folder, .dcm or .mp4",
        ),
    ] = None
    overlay: Annotated[
        Path | None, typer.Option(help="Picture of mask and prompts: .png; with --track: .mp4")
    ] = None
    track: Annotated[
        bool,
        typer.Option(
            "--track", help="Follow the structure from the first frame of a clip to its last"
        ),
    ] = False
    class_name: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="With --track: which class to follow"),
    ] = None
    measurements: Annotated[
        Path | None,
        typer.Option(help="Volume: report of volumes and diameters, a DICOM SR: .dcm; -o is .dcm"),
    ] = None
    class_codes: Annotated[
        Path | None,
        typer.Option(help="Volume: codes and colours of classes, as CSV or dcmqi's JSON"),
    ] = None
    colors: Annotated[
        str | None,
        typer.Option(metavar="NAME=RRGGBB,…", help="Volume: colours of labels in viewers"),
    ] = None
    save_logits: Annotated[
        Path | None, typer.Option(help="Image: write the low-resolution logits: .npy")
    ] = None
    axis: Annotated[int | None, typer.Option(help="Axis of a volume to slice along")] = None
    slice_: Annotated[
        int | None, typer.Option("--slice", help="Segment this slice of a volume as an image")
    ] = None
    volume: Annotated[int | None, typer.Option(help="Which volume of a 4-D NIfTI")] = None
    series: Annotated[
        str | None,
        typer.Option(metavar="UID", help="Which DICOM series of a folder, or of --study"),
    ] = None
    from_web: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Volume: DICOMweb server to fetch --study from"),
    ] = None
    study: Annotated[str | None, typer.Option(metavar="UID", help="With --from-web")] = None
    to_web: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Volume: DICOMweb server to store the .dcm on"),
    ] = None
    orientation: Annotated[
        int | None,
        typer.Option(help="Which orientation of a DICOM series that mixes them; 0 has most images"),
    ] = None
    phase: Annotated[
        int | None,
        typer.Option(help="Which of the DICOM images that share their places: phase, echo; from 0"),
    ] = None
    nan: Annotated[
        Literal["refuse", "background"],
        typer.Option(help="What NaN is: a fault, or background to show black"),
    ] = "refuse"
    overlap: Annotated[
        int | None, typer.Option(help="Volume: slices that neighbouring chunks share")
    ] = None
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Volume: follow masks beyond the prompted slices")
    ] = False
    margin: Annotated[
        float | None,
        typer.Option(help="Volume: pixels around a mask that --propagate follows; default 3"),
    ] = None
    intensity_window: MeasuredWindow = None
    threshold: Threshold = None
    multimask: Annotated[
        bool, typer.Option("--multimask", help="Image: try SAM's three candidates, write the best")
    ] = False

    backend: Backend = "onnxruntime"
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Backend to use if the one before cannot run; repeatable, tried in order",
        ),
    ] = None
    no_cuda_graphs: NoCudaGraphs = False
    precision: Precision = "fp32"
    threads: Threads = None
    max_memory: MaxMemory = None
    trusted: Trusted = None

    def request(self) -> stages.RunRequest:
        """Options of the input and the output."""
        return stages.RunRequest(
            intensity_window=parse_measured_window(self.intensity_window),
            points=parse_rows(self.point, "--point"),
            boxes=parse_rows(self.box, "--box"),
            prompts=self.prompts,
            mask_input=self.mask_input,
            targets=stages.MaskTargets(
                mask=self.output, overlay=self.overlay, logits=self.save_logits
            ),
            selection=stages.VolumeSelection(
                axis=self.axis,
                volume=self.volume,
                series=self.series,
                orientation=self.orientation,
                phase=self.phase,
                nan=self.nan,
            ),
            measurements=self.measurements,
            class_codes=self.class_codes,
            colours=parse_colours(self.colors),
            to_web=self.to_web,
            slice_index=self.slice_,
            overlap=self.overlap,
            propagate=self.propagate,
            margin=self.margin,
            threshold=self.threshold,
            multimask=self.multimask,
        )

    def input(self, image: Path | None) -> Path | WebSeries:
        """What to segment: the path, or a series on a server."""
        web = None
        if self.from_web is not None or self.study is not None:
            web = parse_web_series(self.from_web, self.study, self.series)
        if (image is None) == (web is None):
            raise UsageError("give an image, or --from-web URL with --study UID")
        source = web if image is None else image
        assert source is not None
        return source

    def session(self) -> stages.SessionOptions:
        """How to open the bundle."""
        return stages.SessionOptions(
            backend=self.backend,
            fallback=cast(tuple[BackendName, ...], tuple(self.fallback or ())),
            cuda_graphs=not self.no_cuda_graphs,
            precision=self.precision,
            threads=self.threads,
            trusted=None if self.trusted is None else tuple(self.trusted),
        )


@with_options
def run(
    bundle: Bundle,
    options: RunOptions,
    image: Annotated[
        Path | None, typer.Argument(help="An image, a folder of images, or a volume")
    ] = None,
    json: Json = False,
) -> None:
    """Segment an image, every image of a folder, or a volume, from clicks and boxes.

    A single plane is treated as an image unless you give 3D prompts or write a `.dcm`.

    medsa-deploy run ckpt.medsa image.dcm --point 120,88 -o mask.png --overlay overlay.png

    medsa-deploy run ckpt.medsa image.png --point 120,88 --point 40,60,0 --box 30,40,200,210

    medsa-deploy run ckpt.medsa volume.nii.gz --axis 2 --slice 90 --box 40,30,200,170 -o mask.nii.gz

    medsa-deploy run ckpt.medsa frames/ --point 256,256 -o masks/

    medsa-deploy run ckpt.medsa ct.nii.gz --point 120,88,40 --propagate -o seg.nii.gz

    medsa-deploy run ckpt.medsa dicom-series/ --prompts prompts.json -o seg.dcm

    medsa-deploy run ckpt.medsa --from-web URL --study UID --box 9,9,3,60,60,9 --to-web URL

    medsa-deploy run ckpt.medsa image.png --point 120,88 --backend rtx --fallback onnxruntime

    medsa-deploy run ckpt.medsa clip.mp4 --track --box 40,60,200,210 -o overlay.mp4

    medsa-deploy run ckpt.medsa ultrasound.dcm --track --point 120,88 -o seg.dcm

    prompts.json, in voxels:

    ```
    {"structures": [
      {"name": "liver", "points": [[120, 88, 40], [60, 90, 40, 0]]},
      {"name": "spleen", "boxes": [[30, 40, 38, 90, 110, 52]]}
    ]}
    ```

    A point is x, y, z and its label, 1 (default) or 0. A box is x0, y0, z0, x1, y1, z1, for slices
    z0 to z1 - 1. In a picture z is 0. For a network of several classes give "class" instead of
    "name", or neither.
    """
    with console.progress(shown=not json) as count:
        segment = _track if options.track else _segment
        result = segment(bundle, options, image, count)
    console.print_json(result) if json else _print_result(result)
    if isinstance(result, list) and any(segmentation.error for segmentation in result):
        raise typer.Exit(2)


def _segment(
    bundle: Path, options: RunOptions, image: Path | None, count: Count
) -> stages.RunResult:
    """Segment an image, a folder of images or a volume."""
    if options.class_name is not None:
        raise UsageError("--class is for clips: add --track, or leave it out")
    on_image, on_slice = (partial(count, unit) for unit in ("images", "slices"))
    return stages.run_bundle(
        bundle,
        options.input(image),
        options.request(),
        options.session(),
        on_image=on_image,
        on_slice=on_slice,
    )


def _track(bundle: Path, options: RunOptions, clip: Path | None, count: Count) -> stages.Tracking:
    """Follow a structure through a clip."""
    source = options.input(clip)
    if isinstance(source, WebSeries):
        raise UsageError("--track follows a clip in a file: leave --from-web and --study out")
    return stages.track_clip(
        bundle,
        source,
        options.request(),
        options.session(),
        class_name=options.class_name,
        on_frame=partial(count, "frames"),
    )


def _print_result(result: stages.RunResult | stages.Tracking) -> None:
    if isinstance(result, stages.Tracking):
        _print_tracking(result)
        return
    if isinstance(result, stages.VolumeSegmentation):
        _print_volume(result)
        return
    for segmentation in result if isinstance(result, list) else [result]:
        _print_image(segmentation)


def _print_image(segmentation: stages.Segmentation) -> None:
    if segmentation.error is not None:
        console.print_error(segmentation.error)
        return
    assert segmentation.pixels is not None
    assert segmentation.timings_ms is not None
    image = escape(str(segmentation.image))
    masks = ", ".join(f"{name} {count} px" for name, count in segmentation.pixels.items())
    scores = ", ".join(f"{score:.3f}" for row in segmentation.scores for score in row)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in segmentation.timings_ms.items())
    predicted = f"  predicted IoU {scores}" if scores else ""
    out.print(f"[bold]{image}[/]  {escape(masks)}{predicted}")
    out.print(f"  {times}", style="dim")
    _print_paths(segmentation.mask, segmentation.overlay, segmentation.logits)


def _print_volume(segmentation: stages.VolumeSegmentation) -> None:
    shape = "×".join(map(str, segmentation.shape))
    total = segmentation.shape[segmentation.axis]
    out.print(
        f"[bold]{escape(str(segmentation.volume))}[/]  {shape} voxels, "
        f"{len(segmentation.slices)} of {total} slices along axis {segmentation.axis} segmented "
        f"in {segmentation.seconds:.1f} s"
    )
    table = console.plain_table("label", "name", "voxels", "ml")
    for label in segmentation.labels:
        millilitres = "" if label.millilitres is None else f"{label.millilitres:.2f}"
        table.add_row(str(label.label), escape(label.name), str(label.voxels), millilitres)
    out.print(table)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in segmentation.timings_ms.items())
    window = segmentation.intensity_window
    intensities = "" if window is None else f"; intensities {window[0]:g}…{window[1]:g}"
    out.print(f"  {times} a slice (medians){intensities}", style="dim")
    _print_paths(segmentation.mask, segmentation.overlay, segmentation.measurements)


def _print_tracking(tracking: stages.Tracking) -> None:
    lost = [frame.frame for frame in tracking.frames if frame.lost]
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    names = f": {', '.join(lost[:5])}{more}" if lost else ""
    out.print(
        f"[bold]{escape(str(tracking.clip))}[/]  {len(tracking.frames)} frames in "
        f"{tracking.seconds:.1f} s, {len(lost)} lost{escape(names)}"
    )
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in tracking.timings_ms.items())
    out.print(f"  {times} a frame (medians)", style="dim")
    _print_paths(tracking.mask, tracking.overlay)


def _print_paths(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            out.print(f"  → {escape(str(path))}")
