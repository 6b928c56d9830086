"""Bundles, users, workers and a cache → what the routes of every protocol share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from starlette.requests import Request

from medsa_deploy.errors import UsageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.metrics import Metrics
from medsa_deploy.runtime import VolumePrediction
from medsa_deploy.stages.run.run import SessionOptions

from .bundles import ServedBundle, ServedBundles
from .cache import NetworkCache
from .images import OpenImage
from .leases import Lease, Leases
from .segmenting import SegmentRequest, segment
from .work import Job, WorkPool

HELP = {
    "medsa_serve_requests_total": ("counter", "Requests by route and status"),
    "medsa_serve_segment_seconds_sum": ("counter", "Seconds spent on requests for masks"),
    "medsa_serve_segment_seconds_count": ("counter", "Requests for masks"),
    "medsa_serve_slices_encoded_total": ("counter", "Slices that were encoded"),
    "medsa_serve_images_total": ("counter", "Images opened"),
    "medsa_serve_upload_bytes_total": ("counter", "Bytes of images received"),
    "medsa_serve_leases_ended_total": ("counter", "Leases that ended, by reason"),
    "medsa_serve_leases": ("gauge", "Users connected"),
    "medsa_serve_jobs": ("gauge", "Jobs by state"),
    "medsa_serve_cache_bytes": ("gauge", "Memory of embeddings and logits"),
    "medsa_serve_image_bytes": ("gauge", "Memory of images"),
    "medsa_serve_cache_hits_total": ("counter", "Embeddings and logits that were found"),
    "medsa_serve_cache_misses_total": ("counter", "Embeddings and logits that were computed"),
    "medsa_resident_memory_bytes": ("gauge", "Memory of the process"),
}
"""Metric → its type and meaning."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server runs."""

    bundles: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    token: Path | None = None
    """A file whose first line every request must carry."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    images: Path | None = None
    """A folder whose images may be opened by name."""
    cache_bytes: int = 2 * 2**30
    """Embeddings and logits."""
    image_bytes: int = 4 * 2**30
    """Images of all users."""
    upload_bytes: int = 2**30
    """One upload."""
    workers: int = 2
    queue: int = 32
    """Requests that wait at most."""
    users: int = 32
    idle_seconds: float = 600.0
    liveness_seconds: float = 60.0
    propagate: bool = False
    """Whether nnInteractive's clients follow structures, unless they say otherwise."""
    session: SessionOptions = field(default_factory=SessionOptions)


class Service:
    """All that the routes need; a context manager."""

    def __init__(self, options: ServeOptions, events: EventLog) -> None:
        """BundleError and UsageError for what cannot be served."""
        if not options.bundles:
            raise UsageError("no bundle was named: give at least one")
        if options.images is not None and not options.images.is_dir():
            raise UsageError(f"{options.images} is not a folder: give --images a folder")
        self.options, self.events = options, events
        self.metrics = Metrics(HELP)
        self.cache = NetworkCache(options.cache_bytes)
        with ExitStack() as opened:
            self.bundles = opened.enter_context(ServedBundles(options.bundles, options.session))
            self.leases = opened.enter_context(
                Leases(
                    most=options.users,
                    idle_seconds=options.idle_seconds,
                    liveness_seconds=options.liveness_seconds,
                    on_end=self._ended,
                )
            )
            self.pool = opened.enter_context(
                WorkPool(threads=options.workers, most_waiting=options.queue)
            )
            self._opened = opened.pop_all()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def lease(self, request: Request, *, acts: bool = True) -> Lease:
        """The lease that a request belongs to; LeaseError."""
        lease = self.leases.find(request.headers.get("x-lease-token"))
        if acts:
            lease.act()
        return lease

    def image_room(self, lease: Lease) -> int:
        """Bytes that an image of a lease may take."""
        before = lease.image.size_bytes if lease.image is not None else 0
        return max(0, self.options.image_bytes - self.leases.image_bytes + before)

    def hold(self, lease: Lease, image: OpenImage) -> None:
        """Give a lease its image, and forget the one it had."""
        self.forget_image(lease)
        lease.image = image
        self.metrics.count("medsa_serve_images_total")
        self.events.write(
            "image", shape=image.volume.shape, kind=image.volume.kind, bytes=image.size_bytes
        )

    def forget_image(self, lease: Lease) -> None:
        """Drop a lease's image and all that was computed of it."""
        if lease.image is not None:
            self.cache.forget(lease.image.owner)
            lease.image = None

    def segment(
        self,
        bundle: ServedBundle,
        image: OpenImage,
        wish: SegmentRequest,
        job: Job,
        **callbacks: Callable[..., None],
    ) -> VolumePrediction:
        """Segment for a job, and count it."""
        start = perf_counter()
        calls: dict[str, Any] = {"check": job.check} | callbacks
        prediction = segment(bundle, image, wish, self.cache, **calls)
        seconds = perf_counter() - start
        encoded = prediction.timings_ms["encoded_slices"]
        self.metrics.count("medsa_serve_segment_seconds_sum", seconds)
        self.metrics.count("medsa_serve_segment_seconds_count")
        self.metrics.count("medsa_serve_slices_encoded_total", encoded)
        self.events.write(
            "segmented",
            bundle=bundle.name,
            structures=len(wish.structures),
            slices=len(prediction.slices),
            encoded=int(encoded),
            ms=round(1e3 * seconds, 1),
        )
        return prediction

    async def run(
        self,
        request: Request,
        work: Callable[[Job], Any],
        *,
        lease: Lease | None = None,
        long: bool = False,
    ) -> Any:
        """The result of work in the pool, which is cancelled if the client goes or its lease ends.

        BusyError if too many wait.
        """
        job = self.pool.submit(work, long=long)
        with ExitStack() as stack:
            if lease is not None:
                stack.enter_context(lease.working(job))
            future = asyncio.wrap_future(job.future)
            gone = asyncio.ensure_future(disconnected(request))
            try:
                await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not future.done():
                    job.cancel()
                return await future
            finally:
                job.cancel()
                gone.cancel()

    def metrics_text(self) -> str:
        """Prometheus' text."""
        none: tuple[tuple[str, str], ...] = ()
        gauges: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = {
            ("medsa_serve_leases", none): len(self.leases.all()),
            ("medsa_serve_jobs", (("state", "waiting"),)): self.pool.waiting,
            ("medsa_serve_jobs", (("state", "running"),)): self.pool.running,
            ("medsa_serve_cache_bytes", none): self.cache.bytes,
            ("medsa_serve_image_bytes", none): self.leases.image_bytes,
            ("medsa_serve_cache_hits_total", none): self.cache.hits,
            ("medsa_serve_cache_misses_total", none): self.cache.misses,
        }
        return self.metrics.text(gauges)

    def _ended(self, lease: Lease, reason: str) -> None:
        self.forget_image(lease)
        self.metrics.count("medsa_serve_leases_ended_total", reason=reason)
        self.events.write("lease ended", reason=reason)


async def disconnected(request: Request) -> None:
    """Return once the client has gone; for a request whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
