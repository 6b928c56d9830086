"""The worker process: series in the spool's queue → segmentations in the spool, one at a time.

It is a child of the node (`medsa_deploy.child`), so that a decoder that crashes ends one series and
not the node. It looks into the queue itself and tells the node by notes what it did. A series that
ends the process twice is put aside.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medsa_deploy.child import OnNote
from medsa_deploy.errors import DeviceError, ImageError, MedsaError, PromptError, one_line
from medsa_deploy.images import SegmentationDetails, Volume, read_volume, write_segmentation
from medsa_deploy.images.dicom_seg import segmentation_uid
from medsa_deploy.runtime import Session, Structure
from medsa_deploy.runtime.volumes.segment import segment_volume
from medsa_deploy.stages.run.run import SessionOptions, bundle_details

from .received import short_hash
from .rules import Rule, matching_rule, read_rules
from .spool import Spool
from .study_prompts import study_structures
from .templates import template_structures

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 2
"""A series that ended the process this often is put aside."""
IDLE_SECONDS = 0.1
RETRY_SECONDS = 5.0
"""Time before a series is tried again that a full disk or memory has stopped."""
Result = Literal["segmented", "already sent", "failed", "postponed"]


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What the worker is told."""

    spool: str
    rules: str
    bundle: str
    """Path of the bundle of rules that name none."""
    session: dict[str, Any]
    """Fields of `SessionOptions`."""
    prompt_wait: float
    """Seconds that a series waits for prompts of its study."""
    running: str
    """A file that ends the worker once it is gone."""


def segment_queue(job: dict[str, Any], note: OnNote) -> None:
    """Segment what is queued, until the node stops."""
    logging.getLogger("medsa_deploy").addHandler(_NotedWarnings(note))
    worker = Worker(WorkerJob(**job), note)
    try:
        while Path(worker.job.running).exists():
            if not worker.step():
                time.sleep(IDLE_SECONDS)
    finally:
        worker.close()


class Worker:
    """Sessions on the bundles of the rules, opened when a series first needs them."""

    def __init__(self, job: WorkerJob, note: OnNote) -> None:
        self.job, self.note = job, note
        self.spool = Spool(Path(job.spool))
        self.rules = read_rules(Path(job.rules), Path(job.bundle))
        fallback = tuple(job.session.get("fallback", ()))
        self.options = SessionOptions(**job.session | {"fallback": fallback})
        self._sessions: dict[Path, Session] = {}
        self._not_before: dict[str, float] = {}

    def close(self) -> None:
        """Close the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def step(self) -> bool:
        """Segment the oldest series that can be; False if there is none."""
        for queued in self.spool.jobs("queued"):
            if self._not_before.get(queued.name, 0) > time.monotonic():
                continue
            try:
                source = self.spool.source(queued)
            except (OSError, ValueError) as e:
                self.spool.fail(queued, f"its source.json cannot be read: {one_line(e)}")
                continue
            number = matching_rule(self.rules, source)
            rule = None if number is None else self.rules[number]
            prompts = self._study_prompts(source)
            if rule and rule.template.kind == "study" and not prompts and not self._expired(queued):
                continue
            work = self.spool.state("working") / queued.name
            try:
                queued.rename(work)
            except FileNotFoundError:
                continue
            self._segment(work, source, rule, prompts)
            return True
        return False

    def _segment(
        self, work: Path, source: dict[str, Any], rule: Rule | None, prompts: list[Path]
    ) -> None:
        """Segment one series and tell the node of it."""
        start = time.perf_counter()
        images = self.spool.images(work)
        facts: dict[str, Any] = {
            "job": work.name,
            "images": len(images),
            "last_image": max(path.stat().st_mtime for path in images),
        }
        error, kind = "", ""
        try:
            attempts = _count_attempt(work)
            if attempts > MOST_ATTEMPTS:
                raise ImageError(f"the series ended the worker {MOST_ATTEMPTS} times")
            if rule is None:
                raise PromptError("the rules have changed, and this series' rule is gone")
            result = self._write(work, source, rule, prompts, facts)
        except DeviceError:
            _forget_attempt(work)
            raise  # the node starts a new worker
        except (OSError, MemoryError) as e:
            result, error, kind = "postponed", one_line(e), type(e).__name__
        except MedsaError as e:
            result, error, kind = "failed", str(e), type(e).__name__
        except Exception as e:
            logger.exception("a series cannot be segmented")
            result, error, kind = "failed", f"{type(e).__name__}: {one_line(e)}", type(e).__name__
        facts |= {"result": result, "seconds": round(time.perf_counter() - start, 3)}
        self._settle(work, source, result, error, facts)
        self.note({"event": "segmented", "error": error, "error_kind": kind, **facts})

    def _settle(
        self, work: Path, source: dict[str, Any], result: Result, error: str, facts: dict[str, Any]
    ) -> None:
        """Move a series out of `working`."""
        study_key = short_hash(source["study"])
        if result == "postponed":
            _forget_attempt(work)
            self._not_before[work.name] = time.monotonic() + RETRY_SECONDS
            work.rename(self.spool.state("queued") / work.name)
        elif result == "failed":
            self.spool.add_outcome(study_key, facts)
            self.spool.fail(work, error)
        elif result == "already sent":
            self.spool.add_outcome(study_key, facts)
            self.spool.drop(work)

    def _write(
        self,
        work: Path,
        source: dict[str, Any],
        rule: Rule,
        prompts: list[Path],
        facts: dict[str, Any],
    ) -> Result:
        """Segment a series, and write what is to be sent; `facts` gets what was done."""
        volume = read_volume(work / "images")
        details = self._details(rule, prompts)
        target = work / "results" / "segmentation.dcm"
        uid = segmentation_uid(target, volume, details)
        facts |= {
            "segmentation": uid,
            "bundle": details.bundle,
            "bundle_sha256": details.bundle_sha256,
            "rule": self.rules.index(rule) + 1,
        }
        sending = self.spool.state("sending") / f"{short_hash(source['study'])}_{uid}"
        if (self.spool.state("sent") / f"{uid}.json").exists() or sending.exists():
            return "already sent"
        structures = _structures(rule, volume, prompts)
        prediction = segment_volume(self._session(rule.bundle), volume, structures, rule.options)
        target.parent.mkdir(exist_ok=True)
        write_segmentation(
            target,
            prediction.labels,
            volume,
            names=prediction.names,
            details=details,
            measurements=target.with_name("measurements.dcm") if rule.measurements else None,
        )
        outcome = {**facts, "calling_aet": source["calling_aet"]}
        (work / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
        work.rename(sending)
        # The disk may need the room of the images. The sender may remove the folder meanwhile.
        shutil.rmtree(sending / "images", ignore_errors=True)
        return "segmented"

    def _details(self, rule: Rule, prompts: list[Path]) -> SegmentationDetails:
        """What the segmentation says, and what its UID derives from."""
        identity = rule.identity
        if rule.template.kind == "study":
            identity = short_hash(identity, *sorted(path.name for path in prompts))
        return replace(
            bundle_details(rule.bundle),
            styles=rule.styles,
            automatic=rule.template.kind != "study",
            identity=identity,
        )

    def _session(self, bundle: Path) -> Session:
        if bundle not in self._sessions:
            self._sessions[bundle] = self.options.open(bundle)
        return self._sessions[bundle]

    def _study_prompts(self, source: dict[str, Any]) -> list[Path]:
        """Objects with prompts for a series that have come so far."""
        folder = self.spool.state("prompts") / short_hash(source["study"])
        return [
            path.with_suffix("")
            for path in sorted(folder.glob("*.dcm.json"))
            if source["series"] in json.loads(path.read_text(encoding="utf-8"))
        ]

    def _expired(self, queued: Path) -> bool:
        """Whether a series has waited long enough for prompts."""
        return time.time() - int(queued.name.partition("_")[0]) / 1e9 > self.job.prompt_wait


class _NotedWarnings(logging.Handler):
    """Log records as notes for the node's log."""

    def __init__(self, note: OnNote) -> None:
        super().__init__(logging.WARNING)
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self.note({"event": "warning", "message": str(record.msg), "text": record.getMessage()})


def _structures(rule: Rule, volume: Volume, prompts: list[Path]) -> list[Structure]:
    """The prompts of a series by its rule. A network that needs no prompt gets an empty list."""
    if rule.template.kind != "study":
        return template_structures(rule.template, volume)
    if not prompts:
        raise PromptError("no prompts came with the study: store points or boxes as RTSTRUCT or SR")
    return study_structures(prompts, volume)


def _count_attempt(work: Path) -> int:
    """Count an attempt on the disk, before it begins."""
    path = work / "attempts"
    attempts = (int(path.read_text()) if path.exists() else 0) + 1
    path.write_text(str(attempts))
    return attempts


def _forget_attempt(work: Path) -> None:
    """Take back an attempt that was stopped by something else than the series."""
    (work / "attempts").unlink(missing_ok=True)
