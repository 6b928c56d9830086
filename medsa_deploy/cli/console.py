"""Results → text for a terminal, or JSON for a program; errors and signals → a line, an exit code.

Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from medsa_deploy.errors import MedsaError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class WarningLines(logging.Handler):
    """Log records as single lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        err.print(f"[yellow]{record.levelname.lower()}:[/] {escape(record.getMessage())}")


def prepare() -> None:
    """Send the package's warnings to stderr; let no character end a command it cannot print in."""
    logger = logging.getLogger("medsa_deploy")
    logger.handlers = [h for h in logger.handlers if not isinstance(h, WarningLines)]
    logger.addHandler(WarningLines())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def catch_interrupts() -> list[float]:
    """Make a polite kill end like Ctrl-C; the list fills with the times of interrupts.

    Repeats within a second are ignored: Ctrl-C is often pressed twice, and cleaning up must end.
    """
    times: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not times or monotonic() - times[-1] > 1:
            times.append(monotonic())
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # what a parent ignores (nohup, a shell's background job) stays ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return times


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(result, default=_plain, indent=2))


def print_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")


def print_failure(error: BaseException) -> int:
    """What ended a command, as one line; its exit code."""
    if isinstance(error, MedsaError):
        print_error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        print_error(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 2
    if isinstance(error, MemoryError):
        print_error("out of memory: use a smaller image size or fewer prompts at a time")
        return 3
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    print_error(f"{what} (a fault in medsa-deploy; --debug shows where)")
    return 3


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Names of steps as they begin, with the seconds each took; a spinner where it can be seen."""
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, begun = started[-1]
            err.print(f"  {escape(name)} [dim]{perf_counter() - begun:.1f} s[/]")

    with err.status("") as status:

        def begin(name: str) -> None:
            finish()
            started.append((name, perf_counter()))
            status.update(f"{escape(name)} …")

        yield begin
        finish()


@contextmanager
def progress(shown: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of things done, with the time left; nothing where it cannot be seen."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(
        *columns, console=err, transient=True, disable=not (shown and err.is_terminal)
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps_of_images() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """As `steps`, with a bar of images done in the steps that count them."""
    started: list[tuple[str, float]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())

    def finish() -> None:
        if started:
            name, begun = started[-1]
            err.print(f"  {escape(name)} [dim]{perf_counter() - begun:.1f} s[/]")

    with Progress(
        *columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)

        def begin(name: str) -> None:
            finish()
            started.append((name, perf_counter()))
            progress.reset(task, description=escape(name), total=None)

        yield begin, lambda done, total: progress.update(task, completed=done, total=total)
        finish()


def print_note(note: str) -> None:
    """A choice that was made for the user, on stderr."""
    err.print(escape(note))


def print_files(files: Sequence[tuple[str, int]]) -> None:
    out.print()
    table = plain_table()
    for path, size in files:
        table.add_row(path, f"{size / 1e6:.1f} MB")
    out.print(table)


def print_facts(facts: dict[str, str]) -> None:
    table = plain_table()
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    out.print(table)


def plain_table(*headers: str) -> Table:
    table = Table(*headers, box=None, show_header=bool(headers), pad_edge=False, header_style="dim")
    if not headers:
        table.padding = (0, 2, 0, 0)
    return table


def _plain(value: Any) -> Any:
    """What json does not know: dataclasses and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
