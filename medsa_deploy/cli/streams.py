"""Standard streams → streams that end no command: diagnostics may get lost, results may not.

stderr carries diagnostics: on a full disk or a closed terminal they are dropped. stdout carries
results: a command that cannot write them fails.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from medsa_deploy.errors import UsageError


class Diagnostics:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or nothing."""
        with suppress(OSError, ValueError):  # a full disk; a closed stream
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, if that is possible."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Results:
    """A text stream whose errors say that stdout is meant."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text; UsageError if it cannot be written."""
        with self._errors():
            return self.stream.write(text)

    def flush(self) -> None:
        """Flush what was written; UsageError if it cannot be written."""
        with self._errors():
            self.stream.flush()

    def discard(self) -> None:
        """Send everything to nowhere: a buffer must not fail a second time at the exit."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.discard()
            raise UsageError(
                f"stdout cannot be written to ({e.strerror}): send it elsewhere"
            ) from e

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare_streams() -> None:
    """Open closed descriptors, print unencodable characters as escapes, wrap stdout and stderr.

    A file that took the number of a closed stderr would receive what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it flushes
                stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, Results):
        sys.stdout = cast(TextIO, Results(sys.stdout or _nowhere()))
    if not isinstance(sys.stderr, Diagnostics):
        sys.stderr = cast(TextIO, Diagnostics(sys.stderr or _nowhere()))


def _nowhere() -> TextIO:
    """A stream for a caller who has closed one."""
    return open(os.devnull, "w", encoding="utf-8")
