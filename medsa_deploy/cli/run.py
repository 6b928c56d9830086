"""The command that segments: run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from medsa_deploy import stages
from medsa_deploy.runtime import load

from . import console
from .mask_tables import print_segmentation, print_volume
from .options import (
    Backend,
    Bundle,
    Fallback,
    IntensityWindow,
    Json,
    NoCudaGraphs,
    Precision,
    Threads,
    Threshold,
)
from .values import parse_box, parse_click, parse_numbers, parse_window, refuse


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
    fallback: Fallback = None,
    no_cuda_graphs: NoCudaGraphs = False,
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

    medsa-deploy run ckpt.medsa image.png --point 120,88 --backend rtx --fallback onnxruntime

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
    open_session = partial(
        load,
        bundle,
        backend=backend,
        fallback=fallback or (),
        cuda_graphs=not no_cuda_graphs,
        precision=precision,
        threads=threads,
    )
    window = parse_window(intensity_window)
    rows = [parse_numbers(text, float, "--point") for text in point or ()]
    boxes = [parse_numbers(text, float, "--box") for text in box or ()]
    asked = propagate or prompts is not None or volume is not None
    if stages.takes_volume(image, slice_, points=rows, boxes=boxes, mask=output, asked=asked):
        refuse("images", mask_input=mask_input, save_logits=save_logits, multimask=multimask)
        structures = stages.structures_of(rows, boxes, prompts)
        with (
            open_session() as session,
            console.progress(not json, "slices") as on_slice,
        ):
            segmented = stages.segment_volume_file(
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
        console.print_json(segmented) if json else print_volume(segmented)
        return
    refuse(
        "volumes",
        prompts=prompts,
        volume=volume,
        overlap=overlap,
        propagate=propagate,
        margin=margin,
    )
    clicks = [parse_click(row) for row in rows]
    given = stages.Prompts(
        points=tuple((x, y) for x, y, _ in clicks),
        labels=tuple(label for _, _, label in clicks),
        boxes=tuple(parse_box(row) for row in boxes),
        mask=mask_input,
    )
    default = Path("masks") if image.is_dir() else Path(f"{image.name}.mask.png")
    with (
        open_session() as session,
        console.progress(image.is_dir() and not json, "images") as on_image,
    ):
        results = stages.segment_images(
            session,
            image,
            given,
            stages.MaskTargets(mask=output or default, overlay=overlay, logits=save_logits),
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
            print_segmentation(result)
    if any(result.error for result in results):
        raise typer.Exit(2)
