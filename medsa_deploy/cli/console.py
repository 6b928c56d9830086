"""Results → text for a terminal, or JSON for a program; errors and signals → a line, an exit code.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
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
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from medsa_deploy.errors import MedsaError, UsageError
from medsa_deploy.progress import OnCount, OnStep

from .streams import prepare_streams

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class WarningLines(logging.Handler):
    """Log records as single lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        err.print(f"[yellow]{record.levelname.lower()}:[/] {escape(record.getMessage())}")


def prepare() -> None:
    """Send the package's warnings to stderr, whose failures end no command."""
    prepare_streams()
    logger = logging.getLogger("medsa_deploy")
    logger.handlers = [h for h in logger.handlers if not isinstance(h, WarningLines)]
    logger.addHandler(WarningLines())


def catch_interrupts() -> list[float]:
    """Make SIGTERM and SIGHUP end a command like Ctrl-C; returns the times of interrupts.

    The list fills as interrupts come. Repeats within a second are ignored: people press Ctrl-C
    twice, and cleaning up must not be interrupted.
    """
    times: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not times or monotonic() - times[-1] > 1:
            times.append(monotonic())
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # a signal that the parent ignores (nohup, a shell's background job) stays ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return times


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(result, default=_plain, indent=2))


def print_error(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    try:
        err.print(f"[bold red]error:[/] {escape(line)}")
    except (ImportError, MemoryError, OSError):  # nothing more can be opened, not even rich
        sys.stderr.write(f"error: {line}\n")


def print_warning(message: str) -> None:
    """One line on stderr."""
    err.print(f"[yellow]warning:[/] {escape(message)}")


def print_failure(error: BaseException, *, json: bool) -> int:
    """Print the error that ended a command as one line; returns the exit code.

    `json`: print it on stdout too, as `{"error": {"kind", "message", "path"}}`.
    """
    message, code = _explain(error)
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    print_fault(type(error).__name__, message, path, json=json)
    return code


def print_fault(kind: str, message: str, path: Path | str | None, *, json: bool) -> None:
    """One line on stderr and, for programs, one document on stdout."""
    print_error(message)
    if json:
        about = None if path is None else str(path)
        fault = {"kind": kind, "message": " ".join(message.split()), "path": about}
        try:
            print_json({"error": fault})
            sys.stdout.flush()
        except UsageError:
            pass  # stderr and the exit code tell of the error


def _explain(error: BaseException) -> tuple[str, int]:
    """An error's message and the exit code it ends a command with."""
    if isinstance(error, MedsaError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2
    if isinstance(error, MemoryError) or _is_unmapped(error):
        return "out of memory: use a smaller image size or fewer prompts at a time", 3
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{text} (a fault in medsa-deploy; --debug shows where)", 3


def _is_unmapped(error: BaseException) -> bool:
    """Whether a library could not be loaded for want of memory: the linker has no error code."""
    return isinstance(error, ImportError) and any(
        words in str(error) for words in ("failed to map segment", "cannot allocate memory")
    )


@contextmanager
def steps() -> Iterator[tuple[OnStep, OnCount]]:
    """Print each step with the seconds it took; a terminal also shows the current step.

    Yields the callable to name a step when it begins, and the one to count within it, which adds
    a bar to the step.
    """
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, begun = started[-1]
            err.print(f"  {escape(name)} [dim]{perf_counter() - begun:.1f} s[/]")

    with _live_progress(SpinnerColumn(), TextColumn("{task.description}"), *_COUNT) as bar:
        task = bar.add_task("", total=None)

        def begin(name: str) -> None:
            finish()
            started.append((name, perf_counter()))
            bar.reset(task, description=escape(name), total=None)

        yield begin, lambda done, total: bar.update(task, completed=done, total=total)
        finish()


@contextmanager
def progress(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left, on a terminal only, from the first count on.

    Yields the callable to count with: the unit ("slices"), how many are done, of how many.
    """
    bar_column, count, time_left = _COUNT
    columns = (bar_column, count, TextColumn("{task.description}"), time_left)
    with _live_progress(*columns, shown=shown) as bar:

        def update(unit: str, done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(unit)
            bar.update(task, completed=done, total=total)

        yield update


def _live_progress(*columns: ProgressColumn, shown: bool = True) -> Progress:
    return Progress(*columns, console=err, transient=True, disable=not (shown and err.is_terminal))


class _OfCounted(ProgressColumn):
    """A column that is empty while a step does not count."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self.column = column

    def render(self, task: Task) -> Any:
        return Text() if task.total is None else self.column.render(task)


_COUNT = tuple(map(_OfCounted, (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())))


def print_note(note: str) -> None:
    """Tell the user on stderr of a choice that was made for them."""
    err.print(escape(note))


def print_files(files: Sequence[tuple[str, int]]) -> None:
    """Paths with their sizes, given in bytes."""
    out.print()
    table = plain_table()
    for path, size in files:
        table.add_row(path, f"{size / 1e6:.1f} MB")
    out.print(table)


def print_facts(facts: dict[str, str]) -> None:
    """A table of two columns: names, and values beside them."""
    table = plain_table()
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    out.print(table)


def plain_table(*headers: str) -> Table:
    """A table without lines, and without a header if it has no `headers`."""
    table = Table(*headers, box=None, show_header=bool(headers), pad_edge=False, header_style="dim")
    if not headers:
        table.padding = (0, 2, 0, 0)
    return table


def _plain(value: Any) -> Any:
    """Dataclasses and paths, as values that the json module knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
