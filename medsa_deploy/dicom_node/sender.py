"""Segmentations in the spool → PACS, by C-STORE or STOW, until every destination has them.

What a destination has is marked on the disk, file by file. A node that is killed between the PACS'
answer and the mark sends the file again, with the same SOP Instance UID: the PACS keeps one.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.errors import MissingDependencyError, UsageError, one_line
from medsa_deploy.event_log import EventLog
from medsa_deploy.metrics import Metrics
from medsa_deploy.stages.run.dicomweb import store_files

from .received import short_hash
from .spool import Spool

try:
    import pydicom
    from pynetdicom import AE
except ImportError as e:
    raise MissingDependencyError("pynetdicom", extra="node", purpose="the DICOM node") from e

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between attempts, doubled after each."""
MOST_REFUSALS = 5
"""A file that a destination refuses this often, for what it is, is put aside."""
NETWORK_SECONDS = 30.0
WARNINGS = (0xB000, 0xB006, 0xB007)
"""Statuses of a C-STORE that took the object, and changed something of it."""


class NotSentError(Exception):
    """A destination does not have a file yet."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused
        """Whether the destination does not want the file itself; otherwise it may later."""


class Destination(Protocol):
    """A place that takes DICOM files."""

    @property
    def name(self) -> str:
        """What tells it from other destinations."""

    def send(self, path: Path) -> None:
        """Send one file; NotSentError if it was not taken."""


@dataclass(frozen=True, kw_only=True)
class Pacs:
    """An application entity that takes C-STORE."""

    host: str
    port: int
    aet: str
    calling_aet: str
    tls: ssl.SSLContext | None = None

    @property
    def name(self) -> str:
        """HOST:PORT:AET"""
        return f"{self.host}:{self.port}:{self.aet}"

    def send(self, path: Path) -> None:
        """Send one file over an association of its own."""
        dataset = pydicom.dcmread(path)
        entity = AE(ae_title=self.calling_aet)
        entity.connection_timeout = entity.network_timeout = NETWORK_SECONDS
        entity.acse_timeout = entity.dimse_timeout = NETWORK_SECONDS
        entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
        association = entity.associate(
            self.host,
            self.port,
            ae_title=self.aet,
            tls_args=None if self.tls is None else (self.tls, self.host),
        )
        if not association.is_established:
            raise NotSentError(f"{self.name} took no association")
        try:
            if not association.accepted_contexts:
                raise NotSentError(f"{self.name} takes no {dataset.SOPClassUID.name}", refused=True)
            status = association.send_c_store(dataset).get("Status")
        except (ValueError, RuntimeError, OSError) as e:
            raise NotSentError(f"{self.name}: {one_line(e)}") from e
        finally:
            if association.is_established:
                association.release()
        if status is None:
            raise NotSentError(f"{self.name} ended the association without an answer")
        if status != 0 and status not in WARNINGS:
            out_of_resources = status & 0xFF00 == 0xA700
            raise NotSentError(f"{self.name} answered 0x{status:04X}", refused=not out_of_resources)


@dataclass(frozen=True, kw_only=True)
class WebDestination:
    """A DICOMweb server that takes STOW."""

    name: str
    """Its URL."""

    def send(self, path: Path) -> None:
        """Store one file."""
        try:
            store_files(self.name, [path])
        except Exception as e:  # of the connection, of HTTP, or of the server's answer
            raise NotSentError(f"{self.name}: {one_line(e)}") from e


def parse_destination(text: str, *, calling_aet: str, tls: ssl.SSLContext | None) -> Pacs:
    """`HOST:PORT:AET` → a PACS; UsageError for anything else.

    >>> parse_destination("pacs:104:ORTHANC", calling_aet="MEDSA", tls=None).port
    104
    """
    host, port, aet = ["", "", *text.rsplit(":", 2)][-3:]
    if not (host and aet and len(aet) <= 16 and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"--send {text}: expected HOST:PORT:AET, such as pacs:104:ORTHANC")
    return Pacs(host=host.strip("[]"), port=int(port), aet=aet, calling_aet=calling_aet, tls=tls)


class Sender:
    """Sends what is due; `step` is called again and again by one thread."""

    def __init__(
        self, spool: Spool, destinations: Sequence[Destination], events: EventLog, metrics: Metrics
    ) -> None:
        self.spool, self.destinations = spool, destinations
        self.events, self.metrics = events, metrics
        self._failures: dict[tuple[str, str], int] = {}
        self._refusals: dict[tuple[str, str], int] = {}
        self._due: dict[tuple[str, str], float] = {}

    def step(self) -> None:
        """Send every file whose time has come, and file away what is sent everywhere."""
        for job in self.spool.jobs("sending"):
            for destination in self.destinations:
                key = (job.name, destination.name)
                if self._due.get(key, 0) > time.monotonic():
                    continue
                try:
                    self._send(job, destination)
                except Exception as e:  # a fault with one file must not stop the others
                    self._postpone(key, e)
                    if self._refusals.get(key, 0) >= MOST_REFUSALS:
                        self._give_up(job, str(e))
                        break
            else:
                if all(_is_sent(job, d) for d in self.destinations):
                    self._finish(job)

    def _send(self, job: Path, destination: Destination) -> None:
        """Send a series' files that a destination does not have; each is marked once it has it."""
        for path in _results(job):
            mark = _mark(job, destination, path)
            if not mark.exists():
                destination.send(path)
                mark.parent.mkdir(exist_ok=True)
                mark.touch()

    def _postpone(self, key: tuple[str, str], error: Exception) -> None:
        """Choose the time of the next attempt; a full disk or a silent PACS is no refusal."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        if error.refused if isinstance(error, NotSentError) else not isinstance(error, OSError):
            self._refusals[key] = self._refusals.get(key, 0) + 1
        wait = min(FIRST_WAIT * 2 ** min(failures - 1, 10), LONGEST_WAIT)
        self._due[key] = time.monotonic() + wait
        self.metrics.count("medsa_send_failures_total")
        self.events.write(
            "not sent",
            job=key[0],
            destination=key[1],
            error=one_line(error),
            attempts=failures,
            retry_seconds=wait,
        )

    def _finish(self, job: Path) -> None:
        """File a series away that every destination has."""
        outcome = _outcome(job)
        delay = round(time.time() - outcome["last_image"], 3)
        outcome |= {
            "result": "sent",
            "destinations": [destination.name for destination in self.destinations],
            "delivery_seconds": delay,
        }
        study_key, _, uid = job.name.partition("_")
        self.spool.add_outcome(study_key, outcome)
        write_text(self.spool.state("sent") / f"{uid}.json", json.dumps(outcome) + "\n")
        self.metrics.count("medsa_series_total", result="sent")
        self.metrics.count("medsa_delivery_seconds_sum", delay)
        self.metrics.count("medsa_delivery_seconds_count")
        self.events.write("sent", **outcome)
        self.spool.drop(job)
        self._forget(job)

    def _give_up(self, job: Path, reason: str) -> None:
        """Put a series aside that a destination refuses."""
        outcome = _outcome(job) | {"result": "refused", "error": reason}
        self.spool.add_outcome(job.name.partition("_")[0], outcome)
        self.metrics.count("medsa_series_total", result="refused")
        self.events.write("given up", **outcome)
        self.spool.fail(job, reason)
        self._forget(job)

    def _forget(self, job: Path) -> None:
        for destination in self.destinations:
            for table in (self._failures, self._refusals, self._due):
                table.pop((job.name, destination.name), None)


def _results(job: Path) -> list[Path]:
    """The files to send: the segmentation before the report that refers to it."""
    return sorted((job / "results").glob("*.dcm"), reverse=True)


def _mark(job: Path, destination: Destination, path: Path) -> Path:
    """The file that is there once a destination has a file."""
    return job / "marks" / f"{short_hash(destination.name)}-{path.name}"


def _is_sent(job: Path, destination: Destination) -> bool:
    return all(_mark(job, destination, path).exists() for path in _results(job))


def _outcome(job: Path) -> dict[str, Any]:
    """What the worker noted of a series."""
    outcome: dict[str, Any] = json.loads((job / "outcome.json").read_text(encoding="utf-8"))
    return outcome
