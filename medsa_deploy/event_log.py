"""Events of a service → one JSON object a line, without patient data unless it is allowed."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TextIO


class EventLog:
    """Writes events to a stream; any thread may write.

    >>> import sys
    >>> EventLog(sys.stdout).write("started", port=11112)  # doctest: +ELLIPSIS
    {"time": "...", "event": "started", "port": 11112}
    """

    def __init__(self, stream: TextIO, *, identifiers: bool = False) -> None:
        self.identifiers = identifiers
        """Whether UIDs, texts of headers and messages of errors are written."""
        self._stream = stream
        self._lock = threading.Lock()

    def write(
        self, event: str, identifying: Mapping[str, object] | None = None, **facts: object
    ) -> None:
        """Write an event with its facts; `identifying` facts only if they are allowed.

        An event that cannot be written, as on a full disk, is lost: it must not end its service.
        """
        line = {"time": now(), "event": event, **facts}
        if self.identifiers:
            line |= identifying or {}
        with self._lock, suppress(OSError):
            self._stream.write(json.dumps(line, default=str) + "\n")
            self._stream.flush()

    @contextmanager
    def of_logger(self, name: str) -> Iterator[None]:
        """Write a logger's warnings as events, and by no other handler."""
        logger = logging.getLogger(name)
        handlers = logger.handlers
        logger.handlers = [_EventHandler(self)]
        try:
            yield
        finally:
            logger.handlers = handlers


class _EventHandler(logging.Handler):
    """Log records as events. Without identifiers: the message without its values."""

    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.WARNING)
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.events.write("warning", {"text": record.getMessage()}, message=str(record.msg))


def now() -> str:
    """The time in UTC: `2026-01-31T12:00:00.123Z`."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
