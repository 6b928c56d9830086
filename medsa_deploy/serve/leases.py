"""Users of the server → leases: each holds an image and its work, until it is idle for too long."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from .images import OpenImage
from .refusals import BusyError, LeaseError
from .work import Job

TOKEN_BYTES = 24


class Lease:
    """What one user holds. Only the holder of its token reaches it."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        self.folder = folder
        """Files that the user has sent."""
        self.files = 0
        self.image: OpenImage | None = None
        self.interaction: Any = None
        """State of a protocol that keeps prompts on the server."""
        self.jobs: set[Job] = set()
        self.last_action = self.last_sign = monotonic()

    def act(self) -> None:
        """The user did something."""
        self.last_action = self.last_sign = monotonic()

    def require_image(self) -> OpenImage:
        """The image; LeaseError without one."""
        if self.image is None:
            raise LeaseError("this lease has no image: send one first")
        return self.image

    @contextmanager
    def working(self, job: Job) -> Iterator[Job]:
        """A job that ends with the lease."""
        self.jobs.add(job)
        try:
            yield job
        finally:
            self.jobs.discard(job)


class Leases:
    """The leases there are; any thread may ask. A context manager, whose end ends all of them."""

    def __init__(
        self,
        *,
        most: int,
        idle_seconds: float,
        liveness_seconds: float,
        on_end: Callable[[Lease, str], None] = lambda lease, reason: None,
    ) -> None:
        """`idle_seconds` without an action or `liveness_seconds` without any sign end a lease.
        `on_end` is called with a lease that ends, and the reason."""
        self.most, self.idle_seconds, self.liveness_seconds = most, idle_seconds, liveness_seconds
        self._on_end = on_end
        self._leases: dict[str, Lease] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="medsa-serve-"))
        self._lock = threading.Lock()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *error: object) -> None:
        for lease in self.all():
            self.end(lease, "stopped")
        shutil.rmtree(self._folder, ignore_errors=True)

    def all(self) -> list[Lease]:
        """Every lease."""
        with self._lock:
            return list(self._leases.values())

    @property
    def image_bytes(self) -> int:
        """Memory of all images."""
        return sum(lease.image.size_bytes for lease in self.all() if lease.image is not None)

    def claim(self) -> Lease:
        """A new lease; BusyError if there are too many."""
        self.expire()
        with self._lock:
            if len(self._leases) >= self.most:
                raise BusyError(
                    f"{len(self._leases)} users are connected, which is the most: try again later",
                    retry_after=30,
                )
            lease = Lease(Path(tempfile.mkdtemp(dir=self._folder)))
            self._leases[lease.token] = lease
        return lease

    def find(self, token: str | None) -> Lease:
        """The lease of a token; LeaseError without one."""
        self.expire()
        with self._lock:
            lease = self._leases.get(token or "")
        if lease is None:
            raise LeaseError("the lease is unknown or has expired: connect again")
        lease.last_sign = monotonic()
        return lease

    def remaining(self, lease: Lease) -> float:
        """Seconds until a lease ends for want of an action."""
        return max(0.0, self.idle_seconds - (monotonic() - lease.last_action))

    def expire(self) -> None:
        """End the leases that were idle, or silent, for too long; not while work runs for them."""
        for lease in self.all():
            silent = monotonic() - lease.last_sign > self.liveness_seconds
            if not lease.jobs and (silent or not self.remaining(lease)):
                self.end(lease, "silent" if silent else "idle")

    def end(self, lease: Lease, reason: str) -> None:
        """End a lease: cancel its work, and forget its image."""
        with self._lock:
            if self._leases.pop(lease.token, None) is None:
                return
        for job in tuple(lease.jobs):
            job.cancel()
        self._on_end(lease, reason)
        lease.image = lease.interaction = None
        shutil.rmtree(lease.folder, ignore_errors=True)
