"""What `verify --labels` measured → tables for a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from medsa_deploy.stages.verify.accuracy import Accuracy, Spread, Summary

from .console import out, print_error


def print_accuracy(found: Accuracy) -> None:
    """Every file's figures, then the summary, then what was left out or failed."""
    if any(file.classes for file in found.files):
        out.print(_files(found))
    if shown := _summaries(found):
        out.print()
        out.print(_table_of(shown))
    _print_remarks(found)
    for file in found.files:
        if file.error is not None:
            print_error(file.error)
    for failure in found.failures:
        print_error(failure)


def _files(found: Accuracy) -> Table:
    table = _table("labels", "class", "Dice", "IoU", "HD95")
    for file in found.files:
        for one in file.classes:
            undefined = f"none: {one.hd95_undefined}"
            distance = undefined if one.hd95 is None else f"{one.hd95:.2f} {file.unit}"
            table.add_row(
                escape(file.labels.name),
                escape(one.name),
                f"{one.dice:.4f}",
                f"{one.iou:.4f}",
                distance,
            )
        if file.note is not None:
            table.add_row(escape(file.labels.name), "", "", "", file.note)
    return table


def _summaries(found: Accuracy) -> tuple[Summary, ...]:
    """Those that say more than the files' own lines do, or than each other."""
    several = len(found.summary) > 2
    if len(found.files) == 1:
        return found.summary[:1] if several else ()
    return found.summary if several else found.summary[1:]


def _table_of(summaries: tuple[Summary, ...]) -> Table:
    table = _table("class", "figure", "mean", "median", "worst", "in")
    for one in summaries:
        name = f"{escape(one.name)} ({one.count})"
        for figure, spread in (("Dice", one.dice), ("IoU", one.iou)):
            table.add_row(name, figure, *_spread(spread, ".4f"))
            name = ""
        if one.hd95 is not None:
            table.add_row("", f"HD95 {one.unit}", *_spread(one.hd95, ".2f"))
    return table


def _spread(spread: Spread, form: str) -> tuple[str, ...]:
    figures = (spread.mean, spread.median, spread.worst)
    return (*(format(value, form) for value in figures), escape(spread.worst_file.name))


def _print_remarks(found: Accuracy) -> None:
    """How it was measured, and what was not."""
    remarks = []
    if found.prompt is not None:
        how = {"box": "a box", "click": "a click", "clicks3": "three clicks"}[found.prompt]
        remarks.append(f"{how} from each label; {found.precision} in {found.backend}")
    if found.summary:
        total = found.summary[0]
        remarks.append(f"HD95: {found.hd95_definition}")
        if total.unit is None:
            remarks.append("some files have a spacing and some not: no common HD95 in mm or pixels")
        elif total.unit == "px":
            remarks.append("the files give no spacing: HD95 is in pixels")
        if total.hd95_undefined:
            remarks.append(
                f"{total.hd95_undefined} of {total.count} without HD95, left out of its summary"
            )
    if found.unlabelled:
        remarks.append(f"{len(found.unlabelled)} without labels, left out")
    for remark in remarks:
        out.print(escape(remark), style="dim")


def _table(*headers: str) -> Table:
    return Table(*headers, box=None, pad_edge=False, header_style="dim")
