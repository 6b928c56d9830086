"""Options → a running node: a receiver, a queue, a worker process, a sender and health on HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.child import ChildError, run_in_child
from medsa_deploy.errors import MedsaError, UsageError, one_line
from medsa_deploy.event_log import EventLog
from medsa_deploy.images.file_texts import MODALITIES, code_text
from medsa_deploy.images.limits import current_limits
from medsa_deploy.stages.run.dicomweb import WebSeries
from medsa_deploy.stages.run.run import SessionOptions

from .audit import Audit
from .health import node_metrics, serve_health
from .received import received_object, short_hash
from .receiver import MOST_OBJECT, Receiver, client_context, server_context
from .rules import matching_rule, read_rules
from .segmenting import WorkerJob, segment_queue
from .sender import Destination, Sender, WebDestination, parse_destination
from .spool import Inbox, Spool, requeue

POLL_SECONDS = 0.1
RESTART_SECONDS = 2.0
STOP_SECONDS = 5.0
"""Time that each thread has to end."""
DAY_SECONDS = 24 * 3600.0
PROMPTS_KEPT_DAYS = 1.0
CLEANING_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """How a node runs."""

    bundle: Path
    rules: Path
    spool: Path
    aet: str = "MEDSA"
    host: str = "127.0.0.1"
    port: int = 11112
    send: tuple[str, ...] = ()
    """HOST:PORT:AET of each PACS that gets the segmentations."""
    to_web: str | None = None
    """URL of a DICOMweb server that gets them."""
    from_web: WebSeries | None = None
    """What is fetched and queued when the node starts."""
    quiet_time: float = 30.0
    """Seconds without an image after which a series is complete."""
    expect: int | None = None
    """Images after which a series is complete at once."""
    max_queue: int = 100
    max_object: int = MOST_OBJECT
    """Bytes of an object on the port; a larger one is refused while it comes."""
    prompt_wait: float = 600.0
    """Seconds that a series waits for prompts of its study, if its rule says so."""
    keep_days: float = 30.0
    """Days that failed series, and records of what was sent, stay in the spool; 0 for ever."""
    allow: tuple[str, ...] = ()
    """AE titles that may send; none for all."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_authority: Path | None = None
    send_tls: bool = False
    """Whether the PACS are reached by TLS."""
    http_port: int = 11180
    """Of 127.0.0.1, for health and metrics; 0 for none."""
    log_identifiers: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)


@dataclass(frozen=True, kw_only=True)
class NodeTotals:
    """What a node did since it started."""

    images: int
    """Images taken."""
    sent: int
    """Series whose segmentation every destination has."""
    failed: int
    """Series that cannot be segmented, or are refused."""
    kept_out: int
    """Series that no rule matches."""
    waiting: int
    """Series that are left in the spool, for the next start."""


class Node:
    """A node that takes series from its port; a context manager."""

    def __init__(self, options: NodeOptions, events: EventLog) -> None:
        """UsageError for options, rules or addresses that cannot be used; BundleError."""
        self.options, self.events, self.metrics = options, events, node_metrics()
        self.rules = read_rules(options.rules, options.bundle)
        for bundle in {rule.bundle for rule in self.rules}:
            load_manifest(bundle)  # a bundle that cannot be used is refused now
        destinations = _destinations(options)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._worker_fault: str | None = None
        self._next_cleaning = 0.0
        with ExitStack() as opened:
            self.spool = Spool(options.spool)
            self.inbox = Inbox(self.spool, most_series=options.max_queue)
            opened.callback(self.inbox.close)
            self.audit = Audit(options.spool / "audit.jsonl")
            self.sender = Sender(self.spool, destinations, events, self.metrics)
            self._running = Path(opened.enter_context(TemporaryDirectory())) / "running"
            self._running.touch()
            self._health = self._serve_health(opened)
            self.receiver = self._receiver()
            self._opened = opened.pop_all()

    def __enter__(self) -> Node:
        """Start the threads, and fetch what is to be fetched."""
        for work in (self.receiver.serve, self._run_worker, self._run_sender, self._run_queue):
            thread = threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            thread.start()
            self._threads.append(thread)
        self.events.write(
            "started",
            aet=self.options.aet,
            host=self.options.host,
            port=self.receiver.port,
            rules=len(self.rules),
            series=self.spool.counts(),
        )
        try:
            if self.options.from_web is not None:
                self._fetch(self.options.from_web)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stop taking images, and let go of the spool; a series in work is begun anew next time."""
        self._stopping.set()
        self._running.unlink()
        self.receiver.close(serving=True)
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self._close_books()
        self._opened.close()
        self.events.write("stopped", series=self.spool.counts())

    def totals(self) -> NodeTotals:
        """What was done so far."""
        series = {
            result: self.metrics.total("medsa_series_total", result=result)
            for result in ("sent", "failed", "refused", "kept_out")
        }
        return NodeTotals(
            images=self.metrics.total("medsa_images_received_total"),
            sent=series["sent"],
            failed=series["failed"] + series["refused"],
            kept_out=series["kept_out"],
            waiting=self.inbox.waiting(),
        )

    def faults(self) -> list[str]:
        """What is wrong with the node itself; a PACS that does not answer is none of it."""
        ended = [f"{t.name} has ended" for t in self._threads if not t.is_alive()]
        return ended if self._worker_fault is None else [*ended, self._worker_fault]

    def _receiver(self) -> Receiver:
        options = self.options
        tls = None
        if options.tls_certificate is not None and options.tls_key is not None:
            tls = server_context(options.tls_certificate, options.tls_key, options.tls_authority)
        address = (options.host, options.port)
        with listening(address):
            return Receiver(
                self.inbox,
                self.events,
                self.metrics,
                aet=options.aet,
                address=address,
                allowed=options.allow,
                tls=tls,
                most_object=options.max_object,
                most_at_once=current_limits().memory,
            )

    def _serve_health(self, opened: ExitStack) -> ThreadingHTTPServer | None:
        port = self.options.http_port
        if port == 0:
            return None
        with listening(("127.0.0.1", port)):
            server = serve_health(port, self.faults, self.spool.counts, self.metrics)
        opened.callback(server.server_close)
        opened.callback(server.shutdown)
        return server

    def _run_queue(self) -> None:
        self._repeat(self._watch_queue)

    def _watch_queue(self) -> None:
        """Find complete series, choose their rules, and close the books of finished studies."""
        for job in self.inbox.complete(self.options.quiet_time, self.options.expect):
            self._take(job)
        self._close_books()
        if time.monotonic() >= self._next_cleaning:
            self._clean()
            self._next_cleaning = time.monotonic() + CLEANING_SECONDS

    def _clean(self) -> None:
        """Remove from the spool what has been there for too long."""
        days = {"prompts/*/*": PROMPTS_KEPT_DAYS}
        if self.options.keep_days > 0:
            days |= dict.fromkeys(("failed/[!.]*", "sent/[!.]*"), self.options.keep_days)
        for pattern, limit in days.items():
            if count := self.inbox.remove_old(pattern, limit * DAY_SECONDS):
                self.events.write("expired", kind=pattern.partition("/")[0], files=count)

    def _repeat(self, work: Callable[[], None]) -> None:
        """Do a thread's work until the node stops, whatever a full disk does to it."""
        while not self._stopping.wait(POLL_SECONDS):
            try:
                work()
            except Exception as e:
                self.events.write("fault", {"text": one_line(e)}, error_kind=type(e).__name__)
                self._stopping.wait(RESTART_SECONDS)

    def _close_books(self) -> None:
        """Write the audit lines of studies that no series is left of."""
        for study_key, outcomes in self.spool.finished_studies():
            self.audit.write(study=study_key, series=outcomes)

    def _take(self, job: Path) -> None:
        """Give a complete series its rule, or keep it out."""
        source = self.spool.source(job)
        rule = matching_rule(self.rules, source)
        identifying = {name: source[name] for name in ("patient", "accession", "study", "series")}
        facts = {
            "job": job.name,
            "modality": code_text(source["modality"], MODALITIES),
            "calling_aet": source["calling_aet"],
            "images": len(self.spool.images(job)),
        }
        if rule is None:
            self.spool.add_outcome(short_hash(source["study"]), facts | {"result": "kept out"})
            self.metrics.count("medsa_series_total", result="kept_out")
            self.events.write("kept out", identifying, reason="no rule matches", **facts)
            self.inbox.keep_out(job)  # last: nothing leaves the spool before the log says so
            return
        facts["job"] = self.inbox.queue(job).name
        self.events.write("queued", identifying, rule=rule + 1, **facts)

    def _run_sender(self) -> None:
        self._repeat(self.sender.step)

    def _run_worker(self) -> None:
        """Keep a worker process; one that ends is started again."""
        options = self.options
        job = WorkerJob(
            spool=str(options.spool),
            rules=str(options.rules),
            bundle=str(options.bundle),
            session=asdict(options.session),
            prompt_wait=options.prompt_wait,
            running=str(self._running),
        )
        while not self._stopping.is_set():
            try:
                requeue(self.spool)
                run_in_child(segment_queue, asdict(job), on_note=self._hear)
                return
            except (ChildError, MedsaError, OSError) as e:
                self._worker_fault = f"the worker has ended: {type(e).__name__}"
                self.metrics.count("medsa_worker_restarts_total")
                self.events.write(
                    "worker ended", {"text": one_line(e)}, error_kind=type(e).__name__
                )
                self._stopping.wait(RESTART_SECONDS)

    def _hear(self, note: dict[str, Any]) -> None:
        """Log and count what the worker did."""
        self._worker_fault = None
        event = note.pop("event")
        identifying: dict[str, object] = {
            key: note.pop(key) for key in ("text", "error") if key in note
        }
        self.events.write(event, identifying, **note)
        result = note.get("result")
        if result == "segmented":
            self.metrics.count("medsa_segment_seconds_sum", note["seconds"])
            self.metrics.count("medsa_segment_seconds_count")
        elif result in ("failed", "already sent"):
            self.metrics.count("medsa_series_total", result=result.replace(" ", "_"))

    def _fetch(self, web: WebSeries) -> None:
        """Queue a study of a DICOMweb server, as if it had been sent."""
        with TemporaryDirectory() as folder:
            for path in web.fetch(Path(folder)):
                content = path.read_bytes()
                self.inbox.store(received_object(content, calling_aet=""), content)
                self.metrics.count("medsa_images_received_total")


def _destinations(options: NodeOptions) -> list[Destination]:
    """Where segmentations go; UsageError if that is nowhere."""
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both")
    tls = None
    if options.send_tls:
        tls = client_context(options.tls_certificate, options.tls_key, options.tls_authority)
    destinations: list[Destination] = [
        parse_destination(text, calling_aet=options.aet, tls=tls) for text in options.send
    ]
    if options.to_web is not None:
        destinations.append(WebDestination(name=options.to_web))
    if not destinations:
        raise UsageError("segmentations go nowhere: give --send HOST:PORT:AET or --to-web URL")
    return destinations


@contextmanager
def listening(address: tuple[str, int]) -> Iterator[None]:
    """UsageError if an address cannot be listened on."""
    try:
        yield
    except OSError as e:
        host, port = address
        raise UsageError(
            f"{host}:{port} cannot be listened on: {e.strerror or one_line(e)}; choose another port"
        ) from e
