"""Commands that measure a bundle: verify, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsa_deploy import stages
from medsa_deploy.errors import UsageError

from . import console
from .accuracy_table import print_accuracy
from .graph_tables import print_verification
from .options import Backend, Base, Bundle, IntensityWindow, Json, NoCudaGraphs, Precision, Threads
from .profile_table import print_profile
from .values import parse_names, parse_window


def verify(
    bundle: Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Compare with this checkpoint's network (needs torch)")
    ] = None,
    base: Base = None,
    images: Annotated[
        Path | None, typer.Option(help="With --checkpoint: added to the proof; --labels: segmented")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label file or folder: measure accuracy instead")
    ] = None,
    segmentation: Annotated[
        Path | None, typer.Option(help="What run wrote for the images of --labels")
    ] = None,
    prompt: Annotated[
        stages.PromptKind | None,
        typer.Option(help="What is drawn from --labels for --images; default box"),
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of labels 1, 2, …")
    ] = None,
    min_dice: Annotated[float | None, typer.Option(help="Fail below this mean Dice")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write reports/parity.html into the bundle")
    ] = False,
    intensity_window: IntensityWindow = None,
    axis: Annotated[
        int | None, typer.Option(help="With --labels: axis of volumes to slice along")
    ] = None,
    volume: Annotated[
        int | None, typer.Option(help="With --labels: which volume of a 4-D NIfTI")
    ] = None,
    backend: Backend = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(help="One precision; default all, for --labels fp32")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check a bundle's files, and prove its graphs equal to the checkpoint's network.

    Without a checkpoint, against what its network gave at export; no torch is needed. With labels,
    measure how accurate its masks are instead.

    medsa-deploy verify ckpt.medsa

    medsa-deploy verify ckpt.medsa --checkpoint ckpt.pth --images my-images/

    medsa-deploy verify ckpt.medsa --report

    medsa-deploy verify ckpt.medsa --labels labels/ --images my-images/ --prompt click

    medsa-deploy verify ckpt.medsa --labels labels/ --segmentation masks/ --min-dice 0.8
    """
    if labels is not None:
        if checkpoint or base or report:
            raise UsageError("--checkpoint, --base and --report do not go with --labels")
        with console.progress(not json, "files") as on_file:
            measured = stages.measure_accuracy(
                bundle,
                labels=labels,
                segmentation=segmentation,
                images=images,
                prompt=prompt,
                class_names=parse_names(class_names),
                min_dice=min_dice,
                intensity_window=parse_window(intensity_window),
                backend=backend,
                precision=precision,
                threads=threads,
                axis=axis,
                number=volume,
                on_file=on_file,
            )
        console.print_json(measured) if json else print_accuracy(measured)
        if any(file.error for file in measured.files):
            raise typer.Exit(2)
        raise typer.Exit(1 if measured.failures else 0)
    of_labels = (segmentation, prompt, class_names, min_dice, intensity_window, axis, volume)
    if any(option is not None for option in of_labels):
        raise UsageError(
            "--segmentation, --prompt, --class-names, --min-dice, --intensity-window, --axis and "
            "--volume belong to --labels LABELS"
        )
    with console.steps() as on_step:
        found = stages.verify_bundle(
            bundle,
            checkpoint=checkpoint,
            base=base,
            images=images,
            backend=backend,
            precision=precision,
            threads=threads,
            report=report,
            on_step=on_step,
        )
    console.print_json(found) if json else print_verification(found)
    if found.failures:
        raise typer.Exit(1)


def profile(
    bundle: Bundle,
    runs: Annotated[int, typer.Option(help="Runs that are measured")] = 20,
    image: Annotated[
        Path | None, typer.Option(help="Your image or volume; default a seeded one")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER.json", help="An earlier profile, made with -o")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(help="Exit with 1 beyond this ratio to it; default 1.1")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The profile, with every sample: .json")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A page with plots: .html")] = None,
    backend: Backend = "onnxruntime",
    precision: Precision = "fp32",
    threads: Threads = None,
    no_cuda_graphs: NoCudaGraphs = False,
    json: Json = False,
) -> None:
    """Measure how long loading, encoding and clicks take here, and where the time goes.

    medsa-deploy profile ckpt.medsa -o profile.json --html profile.html

    medsa-deploy profile ckpt.medsa --backend openvino --threads 4 --runs 50

    medsa-deploy profile ckpt.medsa --compare profile.json --max-slowdown 1.05
    """
    if max_slowdown is not None and compare is None:
        raise UsageError("--max-slowdown goes with --compare OTHER.json")
    options = stages.LatencyOptions(
        bundle=str(bundle),
        backend=backend,
        precision=precision,
        threads=threads,
        runs=runs,
        image=None if image is None else str(image),
        cuda_graphs=not no_cuda_graphs,
    )
    outputs = stages.ProfileTargets(
        other=compare,
        json=output,
        html=html,
        **({} if max_slowdown is None else {"max_slowdown": max_slowdown}),
    )
    with console.steps_of_images() as (on_step, on_run):
        found = stages.profile_bundle(bundle, options, outputs, on_step=on_step, on_run=on_run)
    console.print_json(found) if json else print_profile(found)
    if found.comparison is not None and found.comparison.regressions:
        raise typer.Exit(1)
