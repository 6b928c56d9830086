"""medsa-deploy verify: a bundle → its parity with the checkpoint, or its accuracy, in tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from medsa_deploy import stages
from medsa_deploy.errors import UsageError
from medsa_deploy.runtime import Precision as PrecisionName
from medsa_deploy.stages.verify.accuracy import Spread, Summary
from medsa_deploy.stages.verify.verify import AGAINST

from . import console
from .console import out, plain_table, print_error
from .options import (
    Backend,
    Base,
    Bundle,
    Json,
    MaxMemory,
    MeasuredWindow,
    Threads,
    Trusted,
    with_options,
)
from .parity_table import print_parity
from .values import parse_measured_window, parse_names


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """Options that go with --labels only."""

    segmentation: Annotated[
        Path | None, typer.Option(help="With --labels: masks that run wrote, to compare with them")
    ] = None
    prompt: Annotated[
        stages.PromptKind | None,
        typer.Option(
            help="With --labels and --images: prompt drawn from each label; default box, "
            "or none for a network that needs no prompts"
        ),
    ] = None
    class_names: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="With --labels: names of labels 1, 2, …"),
    ] = None
    min_dice: Annotated[
        float | None, typer.Option(help="With --labels: exit with 1 below this mean Dice")
    ] = None
    intensity_window: MeasuredWindow = None
    axis: Annotated[
        int | None, typer.Option(help="With --labels: axis of volumes to slice along")
    ] = None
    volume: Annotated[
        int | None, typer.Option(help="With --labels: which volume of a 4-D NIfTI")
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The options of verify that do not need --labels."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="Compare with this checkpoint's network (needs torch)")
    ] = None
    base: Base = None
    images: Annotated[
        Path | None,
        typer.Option(help="With --checkpoint: images to compare on too; --labels: to segment"),
    ] = None
    labels: Annotated[
        Path | None, typer.Option(help="Label file or folder: measure accuracy instead of parity")
    ] = None
    report: Annotated[
        bool, typer.Option("--report", help="Write reports/parity.html into the bundle")
    ] = False
    backend: Backend = "onnxruntime"
    precision: Annotated[
        PrecisionName | None,
        typer.Option(
            parser=str, metavar="NAME", help="One precision; default all, with --labels fp32"
        ),
    ] = None
    threads: Threads = None
    max_memory: MaxMemory = None
    trusted: Trusted = None


@with_options
def verify(
    bundle: Bundle, options: VerifyOptions, accuracy: AccuracyOptions, json: Json = False
) -> None:
    """Check a bundle's files, and that its graphs give the masks of the checkpoint's network.

    Without --checkpoint, they are compared with the outputs saved at export, which needs no torch.
    With --labels, the accuracy of its masks is measured instead.

    medsa-deploy verify ckpt.medsa

    medsa-deploy verify ckpt.medsa --checkpoint ckpt.pth --images my-images/

    medsa-deploy verify ckpt.medsa --report

    medsa-deploy verify ckpt.medsa --labels labels/ --images my-images/ --prompt click

    medsa-deploy verify ckpt.medsa --labels labels/ --segmentation masks/ --min-dice 0.8
    """
    if options.labels is not None:
        if options.checkpoint or options.base or options.report:
            raise UsageError("--checkpoint, --base and --report do not go with --labels")
        stages.check_signed(bundle, options.trusted)
        measured = _measure_accuracy(bundle, options.labels, options, accuracy, shown=not json)
        console.print_json(measured) if json else _print_accuracy(measured)
        if any(file.error for file in measured.files):
            raise typer.Exit(2)
        raise typer.Exit(1 if measured.failures else 0)
    if accuracy != AccuracyOptions():
        raise UsageError(
            "--segmentation, --prompt, --class-names, --min-dice, --intensity-window, --axis and "
            "--volume belong to --labels LABELS"
        )
    verification = _verify_parity(bundle, options)
    console.print_json(verification) if json else _print_verification(verification)
    if verification.failures:
        raise typer.Exit(1)


def _verify_parity(bundle: Path, options: VerifyOptions) -> stages.Verification:
    with console.steps() as (on_step, _):
        return stages.verify_bundle(
            bundle,
            checkpoint=options.checkpoint,
            base=options.base,
            images=options.images,
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            report=options.report,
            trusted=options.trusted,
            on_step=on_step,
        )


def _measure_accuracy(
    bundle: Path, labels: Path, options: VerifyOptions, accuracy: AccuracyOptions, *, shown: bool
) -> stages.Accuracy:
    with console.progress(shown=shown) as count:
        return stages.measure_accuracy(
            bundle,
            labels=labels,
            segmentation=accuracy.segmentation,
            images=options.images,
            prompt=accuracy.prompt,
            class_names=parse_names(accuracy.class_names),
            min_dice=accuracy.min_dice,
            intensity_window=parse_measured_window(accuracy.intensity_window),
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            axis=accuracy.axis,
            number=accuracy.volume,
            on_file=partial(count, "files"),
        )


def _print_verification(verification: stages.Verification) -> None:
    for parity in verification.parity:
        print_parity(parity, AGAINST[verification.against])
    for engine in verification.engines:
        out.print(escape(f"{engine.folder}: {engine.state}"))
    if verification.report is not None:
        out.print(f"report {escape(str(verification.report))}")
    for failure in verification.failures:
        print_error(failure)
    for signer in verification.signers:
        out.print(f"signed by {signer[:16]}")
    if not verification.failures:
        out.print("[bold green]verified[/]")


def _print_accuracy(accuracy: stages.Accuracy) -> None:
    """Every file's figures, then the summary, then the files that were left out or failed."""
    if any(file.classes for file in accuracy.files):
        out.print(_file_table(accuracy))
    if summaries := _informative_summaries(accuracy):
        out.print()
        out.print(_summary_table(summaries))
    for remark in _remarks(accuracy):
        out.print(escape(remark), style="dim")
    for file in accuracy.files:
        if file.error is not None:
            print_error(file.error)
    for failure in accuracy.failures:
        print_error(failure)


def _file_table(accuracy: stages.Accuracy) -> Table:
    table = plain_table("labels", "class", "Dice", "IoU", "HD95")
    for file in accuracy.files:
        name = escape(file.labels.name)
        for measured in file.classes:
            undefined = f"none: {measured.hd95_undefined}"
            distance = undefined if measured.hd95 is None else f"{measured.hd95:.2f} {file.unit}"
            table.add_row(
                name,
                escape(measured.name),
                f"{measured.dice:.4f}",
                f"{measured.iou:.4f}",
                distance,
            )
        if file.note is not None:
            table.add_row(name, "", "", "", file.note)
    return table


def _informative_summaries(accuracy: stages.Accuracy) -> tuple[Summary, ...]:
    """The summaries that repeat neither the files' own lines nor each other."""
    has_several_classes = len(accuracy.summary) > 2
    if len(accuracy.files) == 1:
        return accuracy.summary[:1] if has_several_classes else ()
    return accuracy.summary if has_several_classes else accuracy.summary[1:]


def _summary_table(summaries: tuple[Summary, ...]) -> Table:
    table = plain_table("class", "figure", "mean", "median", "worst", "in")
    for summary in summaries:
        table.add_row(
            f"{escape(summary.name)} ({summary.count})", "Dice", *_spread(summary.dice, ".4f")
        )
        table.add_row("", "IoU", *_spread(summary.iou, ".4f"))
        if summary.hd95 is not None:
            table.add_row("", f"HD95 {summary.unit}", *_spread(summary.hd95, ".2f"))
    return table


def _spread(spread: Spread, form: str) -> tuple[str, ...]:
    figures = (spread.mean, spread.median, spread.worst)
    return (*(format(value, form) for value in figures), escape(spread.worst_file.name))


def _remarks(accuracy: stages.Accuracy) -> list[str]:
    """The measurement of accuracy, and the files that were left out."""
    remarks = []
    if accuracy.prompt is not None:
        prompts = {
            "box": "a box from each label",
            "click": "a click from each label",
            "clicks3": "three clicks from each label",
            "none": "without prompts",
        }
        remarks.append(f"{prompts[accuracy.prompt]}; {accuracy.precision} in {accuracy.backend}")
    if accuracy.summary:
        total = accuracy.summary[0]
        remarks.append(f"HD95: {accuracy.hd95_definition}")
        if total.unit is None:
            remarks.append("some files have a spacing and some not: no common HD95 in mm or pixels")
        elif total.unit == "px":
            remarks.append("the files give no spacing: HD95 is in pixels")
        if total.hd95_undefined:
            remarks.append(
                f"{total.hd95_undefined} of {total.count} without HD95, left out of its summary"
            )
    if accuracy.unlabelled:
        remarks.append(f"{len(accuracy.unlabelled)} without labels, left out")
    return remarks
