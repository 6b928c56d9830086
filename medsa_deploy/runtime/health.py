"""Calls of a session → its health: the age of the last result, faults, memory.

A watchdog polls it, so that a scanner shows a session that hangs, fails or grows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from time import monotonic
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from medsa_deploy.errors import InputError, MissingDependencyError, UsageError
from medsa_deploy.machine import resident_bytes

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H", bound="HasCallRecord")

REFUSALS = (InputError, UsageError, MissingDependencyError)
"""Errors about what a call was given; every other one is a fault."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """A session's state at one moment."""

    open: bool
    """False once the session is closed."""
    results: int
    """Calls that gave a result."""
    refusals: int
    """Calls that were refused: an image, a prompt or an option that cannot be used."""
    faults: int
    """Calls that failed for any other reason."""
    last_fault: str | None
    """Kind of the last fault, such as `DeviceError`; its message may name files, so it is left
    out."""
    last_result_age_s: float | None
    """Seconds since the last result; None before the first."""
    running_s: float | None
    """Seconds that the longest call in progress has taken so far; None if no call runs."""
    memory_mb: float | None
    """Resident memory of the process in MB; None if the system does not report it."""
    degraded: str | None
    """Why a fallback backend is in use; None while the one that was asked for is."""


class CallRecord:
    """Counts the calls of one session. Any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nested = threading.local()
        self._running: dict[object, float] = {}
        """Calls in progress → the moment each began."""
        self._results = self._refusals = self._faults = 0
        self._last_fault: str | None = None
        self._last_result: float | None = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count the block as one call, calls within it included; its exception passes through."""
        if getattr(self._nested, "is_running", False):
            yield
            return
        token = object()
        self._nested.is_running = True
        with self._lock:
            self._running[token] = monotonic()
        try:
            yield
        except BaseException as e:
            with self._lock:
                if isinstance(e, REFUSALS):
                    self._refusals += 1
                else:
                    self._faults += 1
                    self._last_fault = type(e).__name__
            raise
        else:
            with self._lock:
                self._results += 1
                self._last_result = monotonic()
        finally:
            self._nested.is_running = False
            with self._lock:
                del self._running[token]

    def health(self, *, is_open: bool, degraded: str | None) -> Health:
        """The state now. It takes microseconds, and waits for no call in progress."""
        with self._lock:
            now = monotonic()
            return Health(
                open=is_open,
                results=self._results,
                refusals=self._refusals,
                faults=self._faults,
                last_fault=self._last_fault,
                last_result_age_s=None if self._last_result is None else now - self._last_result,
                running_s=now - min(self._running.values()) if self._running else None,
                memory_mb=resident_mb(),
                degraded=degraded,
            )


class HasCallRecord(Protocol):
    """An object whose calls are counted."""

    _calls: CallRecord


def counted(
    method: Callable[Concatenate[H, P], R],
) -> Callable[Concatenate[H, P], R]:
    """The method, its calls counted in the object's `_calls`."""

    @wraps(method)
    def call(owner: H, /, *args: P.args, **options: P.kwargs) -> R:
        with owner._calls.call():
            return method(owner, *args, **options)

    return call


def resident_mb() -> float | None:
    """Resident memory of this process in MB; None if the system does not report it."""
    size = resident_bytes()
    return None if size is None else size / 1e6
