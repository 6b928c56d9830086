"""The command line: parse, call one function of `stages`, print its dataclass."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

try:
    import typer

    from . import __version__, console, stages
    from .errors import UsageError
    from .runtime import load
except KeyboardInterrupt:  # these take a third of a second, and `main` is not there yet
    raise SystemExit(130) from None

app = typer.Typer(
    name="medsa-deploy",
    help="From a trained Medical SAM Adapter checkpoint to masks on a scanner.",
    add_completion=False,
    rich_markup_mode="markdown",
)

ParserError: Any = typer.BadParameter.__bases__[0]
"""The parser's usage error: click's, or that of the copy of click that newer typers carry."""

T = TypeVar("T", int, float)
Checkpoint = Annotated[Path, typer.Argument(help="`.pth`, `.pt` or `.safetensors`")]
Bundle = Annotated[Path, typer.Argument(help="A bundle: the folder that export made")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout")]
Base = Annotated[Path | None, typer.Option(help="SAM checkpoint an adapter-only file goes over")]
Images = Annotated[Path | None, typer.Option(help="Your images, added to the proof")]
IntensityWindow = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Intensities of black and white, such as -175,250"),
]
Threshold = Annotated[float | None, typer.Option(help="Probability above which a pixel is mask")]
Backend = Annotated[str, typer.Option(help="What runs the graphs: onnxruntime")]
Precision = Annotated[str, typer.Option(help="Precision of the graphs to run")]
Threads = Annotated[int | None, typer.Option(help="Threads; default all cores")]


@dataclass(frozen=True, kw_only=True)
class OverrideOptions:
    """Options that overrule what a checkpoint shows, or say what it does not."""

    heads: Annotated[int | None, typer.Option(help="Attention heads of the ViT")] = None
    window_size: Annotated[
        int | None, typer.Option(help="Attention window of the ViT, in tokens")
    ] = None
    global_blocks: Annotated[
        str | None, typer.Option(metavar="I,J,…", help="Global blocks, such as 2,5,8,11")
    ] = None
    image_size: Annotated[
        int | None, typer.Option(help="Side of the network's input, in pixels")
    ] = None
    classes: Annotated[int | None, typer.Option(help="Classes the network was trained for")] = None
    depth_chunk: Annotated[
        str | None,
        typer.Option(metavar="D|none", help="3D: slices that see each other; none: all --slices"),
    ] = None
    slices: Annotated[
        int | None, typer.Option(help="3D: slices of the graph, with --depth-chunk none")
    ] = None
    sd_trans: Annotated[
        Literal["public", "paper"] | None,
        typer.Option(help="3D: how slices are grouped; checkpoints of the public code: public"),
    ] = None
    preprocess: Annotated[
        Literal["medsa", "sam", "medsam", "litemedsam"] | None,
        typer.Option(help="How images become the network's input"),
    ] = None
    intensity_window: IntensityWindow = None
    point_order: Annotated[
        Literal["xy", "yx"] | None,
        typer.Option(help="Order of coordinates the network was trained on"),
    ] = None
    point_frame: Annotated[
        Literal["network", "image"] | None, typer.Option(help="Frame of coordinates, likewise")
    ] = None
    prompt_scope: Annotated[
        Literal["chunk", "slice"] | None,
        typer.Option(help="3D: whether prompts are for their chunk of slices, or their slice"),
    ] = None
    point_scale: Annotated[
        float | None, typer.Option(help="What training multiplied coordinates by")
    ] = None
    pad_points: Annotated[
        int | None, typer.Option(help="Points efficient_sam's prompts are padded to; 0 for none")
    ] = None
    threshold: Threshold = None
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of the classes: liver,spleen")
    ] = None


def with_overrides(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `overrides`, as typer wants it: with a parameter for each option."""
    options = signature(OverrideOptions, eval_str=True).parameters
    own = signature(command, eval_str=True).parameters

    @wraps(command)
    def flat(**given: Any) -> None:
        options_given = OverrideOptions(**{name: given.pop(name) for name in options})
        command(**given, overrides=_overrides(options_given))

    parameters = [p for name, p in own.items() if name != "overrides"] + [*options.values()]
    flat.__dict__["__signature__"] = Signature(
        [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    )
    return flat


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medsa-deploy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; goes anywhere")
    ] = False,
) -> None:
    """From a trained Medical SAM Adapter checkpoint to masks on a scanner."""


@app.command()
@with_overrides
def inspect(checkpoint: Checkpoint, overrides: Any, base: Base = None, json: Json = False) -> None:
    """Say what a checkpoint is, and what it does not settle.

    medsa-deploy inspect ckpt.pth
    """
    found = stages.inspect(checkpoint, base=base, overrides=overrides)
    console.print_json(found) if json else console.print_inspection(found)


@app.command()
@with_overrides
def export(
    checkpoint: Checkpoint,
    overrides: Any,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The bundle to make")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle")] = False,
    base: Base = None,
    images: Images = None,
    json: Json = False,
) -> None:
    """Export a checkpoint as a bundle, proved equal to its own network.

    medsa-deploy export ckpt.pth

    medsa-deploy export adapters.pth --base sam_vit_b_01ec64.pth --images my-images/

    medsa-deploy export medsam_vit_b.pth --preprocess medsam

    medsa-deploy export volumes.pth --depth-chunk 8 --intensity-window -175,250
    """
    with console.steps() as on_step:
        made = stages.export(
            checkpoint,
            output=output,
            base=base,
            images=images,
            overrides=overrides,
            force=force,
            on_step=on_step,
        )
    console.print_json(made) if json else console.print_export(made)


@app.command()
def run(
    bundle: Bundle,
    image: Annotated[Path, typer.Argument(help="An image, a folder of images, or a volume")],
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,LABEL]",
            help="A click; label 1 foreground, 0 background. In a volume X,Y,Z[,LABEL]",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="A box; several are several objects. In a volume X0,Y0,Z0,X1,Y1,Z1",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Volume: prompts of several structures, as JSON")
    ] = None,
    mask_input: Annotated[
        Path | None, typer.Option(help="`.npy` logits of an earlier mask (--save-logits)")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Mask: .png, .npy, .nii.gz; a folder for a folder; volume: .nii.gz, .npy, .dcm",
        ),
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Picture of mask and prompts: .png")] = None,
    save_logits: Annotated[Path | None, typer.Option(help="Low-resolution logits: .npy")] = None,
    axis: Annotated[int | None, typer.Option(help="Axis of a volume to slice along")] = None,
    slice_: Annotated[
        int | None, typer.Option("--slice", help="One slice of a volume, as an image")
    ] = None,
    volume: Annotated[int | None, typer.Option(help="Which volume of a 4-D NIfTI")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Volume: slices that neighbouring chunks share")
    ] = None,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Volume: follow masks beyond the prompted slices")
    ] = False,
    margin: Annotated[
        float | None, typer.Option(help="Volume: pixels around a mask that is followed; default 3")
    ] = None,
    intensity_window: IntensityWindow = None,
    threshold: Threshold = None,
    multimask: Annotated[
        bool, typer.Option("--multimask", help="SAM's three candidates; the best is written")
    ] = False,
    backend: Backend = "onnxruntime",
    precision: Precision = "fp32",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Segment an image, every image of a folder, or a volume, from clicks and boxes.

    medsa-deploy run ckpt.medsa image.dcm --point 120,88 -o mask.png --overlay overlay.png

    medsa-deploy run ckpt.medsa image.png --point 120,88 --point 40,60,0 --box 30,40,200,210

    medsa-deploy run ckpt.medsa volume.nii.gz --axis 2 --slice 90 --box 40,30,200,170 -o mask.nii.gz

    medsa-deploy run ckpt.medsa frames/ --point 256,256 -o masks/

    medsa-deploy run ckpt.medsa ct.nii.gz --point 120,88,40 --propagate -o seg.nii.gz

    medsa-deploy run ckpt.medsa dicom-series/ --prompts prompts.json -o seg.dcm

    prompts.json, in voxels:

    ```
    {"structures": [
      {"name": "liver", "points": [[120, 88, 40], [60, 90, 40, 0]]},
      {"name": "spleen", "boxes": [[30, 40, 38, 90, 110, 52]]}
    ]}
    ```

    A point is x, y, z and its label, 1 (default) or 0; a box x0, y0, z0, x1, y1, z1, in the slices
    z0 to z1 - 1. "class" instead of "name" takes one class of a network of several; without
    either, a structure gives all of them.
    """
    window = _window(intensity_window)
    if stages.takes_volume(image, slice_):
        _refuse("images", mask_input=mask_input, save_logits=save_logits, multimask=multimask)
        structures = stages.structures_of(
            [_numbers(text, float, "--point") for text in point or ()],
            [_numbers(text, float, "--box") for text in box or ()],
            prompts,
        )
        with (
            load(bundle, backend=backend, precision=precision, threads=threads) as session,
            console.progress(not json, "slices") as on_slice,
        ):
            segmented = stages.run_volume(
                session,
                image,
                structures,
                stages.VolumeOptions(
                    intensity_window=window,
                    threshold=threshold,
                    overlap=overlap or 0,
                    propagate=propagate,
                    margin=margin,
                ),
                mask=output,
                overlay=overlay,
                axis=axis,
                number=volume,
                on_slice=on_slice,
            )
        console.print_json(segmented) if json else console.print_volume(segmented)
        return
    _refuse(
        "volumes",
        prompts=prompts,
        volume=volume,
        overlap=overlap,
        propagate=propagate,
        margin=margin,
    )
    clicks = [_click(text) for text in point or ()]
    given = stages.Prompts(
        points=tuple((x, y) for x, y, _ in clicks),
        labels=tuple(label for _, _, label in clicks),
        boxes=tuple(_box(text) for text in box or ()),
        mask=mask_input,
    )
    default = Path("masks") if image.is_dir() else Path(f"{image.name}.mask.png")
    with (
        load(bundle, backend=backend, precision=precision, threads=threads) as session,
        console.progress(image.is_dir() and not json, "images") as on_image,
    ):
        results = stages.run(
            session,
            image,
            given,
            stages.Outputs(mask=output or default, overlay=overlay, logits=save_logits),
            axis=axis,
            index=slice_,
            intensity_window=window,
            threshold=threshold,
            multimask=multimask,
            on_image=on_image,
        )
    if json:
        console.print_json(results if image.is_dir() else results[0])
    else:
        for result in results:
            console.print_segmentation(result)
    if any(result.error for result in results):
        raise typer.Exit(2)


@app.command()
def verify(
    bundle: Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Compare with this checkpoint's network (needs torch)")
    ] = None,
    base: Base = None,
    images: Images = None,
    backend: Backend = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help="One precision; default all")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check a bundle's files, and prove its graphs equal to the checkpoint's network.

    Without a checkpoint, against what its network gave at export; no torch is needed.

    medsa-deploy verify ckpt.medsa

    medsa-deploy verify ckpt.medsa --checkpoint ckpt.pth --images my-images/
    """
    with console.steps() as on_step:
        found = stages.verify_bundle(
            bundle,
            checkpoint=checkpoint,
            base=base,
            images=images,
            backend=backend,
            precision=precision,
            threads=threads,
            on_step=on_step,
        )
    console.print_json(found) if json else console.print_verification(found)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine has, and what is missing.

    medsa-deploy doctor
    """
    found = stages.diagnose()
    console.print_json(found) if json else console.print_diagnosis(found)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[
        Literal["medsa", "litemedsam"],
        typer.Option(help="medsa: a small Med-SA, in 3D. litemedsam: its published weights, in 2D"),
    ] = "medsa",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write")] = Path("demo"),
    json: Json = False,
) -> None:
    """Export trained weights, segment a real MR volume, print Dice and timings.

    medsa-deploy demo

    medsa-deploy demo --model litemedsam
    """
    if model == "litemedsam":
        with console.steps() as on_step:
            lite = stages.demonstrate_litemedsam(output, on_step=on_step)
        console.print_json(lite) if json else console.print_litemedsam(lite)
        return
    with console.steps() as on_step:
        found = stages.demonstrate(output, on_step=on_step)
    console.print_json(found) if json else console.print_demonstration(found)
    if not found.verified:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: every error becomes one line and an exit code."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    console.prepare()
    interrupts = console.catch_interrupts()
    try:
        code = app(arguments or ["--help"], prog_name="medsa-deploy", standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except (Exception, KeyboardInterrupt) as e:
        if len(arguments) < len(sys.argv[1:]):
            traceback.print_exc()
        code = None if interrupts else console.print_failure(_usage_error(e))
    if interrupts:  # whatever the libraries in between made of it
        console.print_error("interrupted: nothing half-written was left")
        sys.stdout.flush()
        os._exit(130)  # Python may end by a signal instead, if C code has seen the interrupt
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage_error(error: BaseException) -> BaseException:
    """The parser's complaint as ours, with where to look; any other error as it is."""
    if not isinstance(error, ParserError):
        return error
    command = error.ctx.command_path if getattr(error, "ctx", None) else "medsa-deploy"
    return UsageError(f"{error.format_message().rstrip('.')}: see {command} --help")


def _overrides(options: OverrideOptions) -> Any:
    """The options as `Overrides`, which come with torch."""
    blocks, names = options.global_blocks, options.class_names
    parsed = {
        "depth_chunk": _depth_chunk(options.depth_chunk),
        "global_blocks": None if blocks is None else _numbers(blocks, int, "--global-blocks"),
        "intensity_window": _window(options.intensity_window),
        "class_names": None if names is None else tuple(n.strip() for n in names.split(",")),
    }
    with stages.checkpoints.export_extra():
        from .exporters.architecture import Overrides
    return Overrides(**asdict(options) | parsed)


def _refuse(what: str, **options: object) -> None:
    """UsageError for options that were given, and are for images or volumes only."""
    for name, value in options.items():
        if value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is for {what}: leave it out here")


def _depth_chunk(text: str | None) -> int | str | None:
    """D or `none`."""
    if text is None or text == "none":
        return text
    values = _numbers(text, int, "--depth-chunk")
    if len(values) != 1:
        raise UsageError(f"--depth-chunk {text}: expected a number of slices, or none")
    return values[0]


def _click(text: str) -> tuple[float, float, int]:
    """X,Y or X,Y,LABEL."""
    values = _numbers(text, float, "--point")
    if len(values) not in (2, 3) or values[2:] not in ((), (0,), (1,)):
        raise UsageError(f"--point {text}: expected X,Y or X,Y,LABEL with label 1 or 0 in an image")
    return values[0], values[1], int(values[2]) if len(values) == 3 else 1


def _box(text: str) -> tuple[float, float, float, float]:
    """X0,Y0,X1,Y1."""
    values = _numbers(text, float, "--box")
    if len(values) != 4:
        raise UsageError(f"--box {text}: expected X0,Y0,X1,Y1 in an image")
    return values[0], values[1], values[2], values[3]


def _window(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH."""
    if text is None:
        return None
    values = _numbers(text, float, "--intensity-window")
    if len(values) != 2 or not values[0] < values[1]:
        raise UsageError(f"--intensity-window {text}: expected LOW,HIGH with LOW < HIGH")
    return values[0], values[1]


def _numbers(text: str, kind: type[T], option: str) -> tuple[T, ...]:
    """Finite numbers between commas."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(isfinite, values)):
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text}: expected {what} between commas")
    return values


if __name__ == "__main__":
    main()
