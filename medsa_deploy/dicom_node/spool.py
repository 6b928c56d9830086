"""Received images → series on disk, and their way through the node: a queue that survives kill -9.

Every series is a folder, and each step of its way is a rename, so that it is in one place whenever
the node ends:

receiving/KEY   images still come in
queued/JOB      complete; JOB is the time and KEY
working/JOB     being segmented; back to queued when the node or the worker starts
sending/UID     `results/`, to be sent; UID is derived, so that a second copy lands on the first
sent/UID.json   what was sent; nothing of the patient
failed/JOB      cannot be segmented or sent; `reason.txt` says why

`prompts/STUDY/` holds objects with prompts, `studies/STUDY.jsonl` what became of a study's series.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.atomic import write_bytes
from medsa_deploy.errors import MedsaError, UsageError

from .received import ReceivedObject, short_hash

STATES = ("receiving", "queued", "working", "sending", "failed")
FOLDERS = (*STATES, "sent", "prompts", "studies")
TEMPORARY = ".medsa-*"
"""Names of files that were being written when a process ended."""


class QueueFullError(MedsaError):
    """The queue holds as many series as it may, and another one cannot begin."""


class Spool:
    """The folders of a spool. One node uses a spool at a time; its worker is a second process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # it holds patients' images
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)

    def state(self, name: str) -> Path:
        """The folder of a state."""
        return self.folder / name

    def jobs(self, state: str) -> list[Path]:
        """Folders of a state, the oldest first."""
        return sorted(p for p in self.state(state).iterdir() if not p.name.startswith("."))

    def counts(self) -> dict[str, int]:
        """Series in each state."""
        return {state: len(self.jobs(state)) for state in STATES}

    def source(self, job: Path) -> dict[str, Any]:
        """The facts of a series' first object."""
        facts: dict[str, Any] = json.loads((job / "source.json").read_text(encoding="utf-8"))
        return facts

    def images(self, job: Path) -> list[Path]:
        """The files of a series."""
        return sorted(p for p in (job / "images").glob("*.dcm") if not p.name.startswith("."))

    def fail(self, job: Path, reason: str) -> None:
        """Keep a series for people to look at."""
        (job / "reason.txt").write_text(reason + "\n", encoding="utf-8")
        target = self.state("failed") / job.name
        shutil.rmtree(target, ignore_errors=True)
        job.rename(target)

    def drop(self, job: Path) -> None:
        """Remove a series; it leaves its state at once."""
        trash = self.folder / "failed" / f".trash-{job.name}"
        shutil.rmtree(trash, ignore_errors=True)
        job.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def add_outcome(self, study_key: str, outcome: dict[str, Any]) -> None:
        """Note what became of a series, for the audit line of its study."""
        path = self.state("studies") / f"{study_key}.jsonl"
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(outcome) + "\n")

    def finished_studies(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Studies without a series on its way, with what became of each; each is named once."""
        busy = {
            _study_key(state, job.name)
            for state in ("receiving", "queued", "working", "sending")
            for job in self.jobs(state)
        }
        for path in sorted(self.state("studies").glob("*.jsonl")):
            if path.stem not in busy:
                lines = path.read_text(encoding="utf-8").splitlines()
                outcomes = {line["job"]: line for line in map(_json_line, lines) if line}
                yield path.stem, list(outcomes.values())
                path.unlink()  # not before the audit line is on the disk


class Inbox:
    """The spool as the node's own process uses it: it takes images and finds complete series."""

    def __init__(self, spool: Spool, *, most_series: int) -> None:
        self.spool, self.most_series = spool, most_series
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        """Series that is coming in → when its last image came, by the monotonic clock."""
        self._file = (spool.folder / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise UsageError(
                f"{spool.folder} is in use by another node: give each its own --spool"
            ) from e
        self._recover()

    def close(self) -> None:
        """Let another node use the spool."""
        self._file.close()

    def store(self, item: ReceivedObject, content: bytes) -> None:
        """Put an object on the disk; once this returns it is not lost.

        QueueFullError for the first image of a series if there is no room; OSError if the disk is
        full.
        """
        name = f"{short_hash(item.instance)}.dcm"
        if item.is_prompt:
            folder = self.spool.state("prompts") / item.study_key
            folder.mkdir(exist_ok=True)
            write_bytes(folder / name, content)
            write_bytes(folder / f"{name}.json", json.dumps(item.referenced_series).encode())
            return
        with self._lock:
            job = self.spool.state("receiving") / item.series_key
            if not job.exists():
                if self.waiting() >= self.most_series:
                    raise QueueFullError(
                        f"{self.most_series} series wait, expected fewer: send it again later"
                    )
                self._begin(job, item)
            self._last[job.name] = time.monotonic()
            write_bytes(job / "images" / name, content)

    def waiting(self) -> int:
        """Series on their way."""
        counts = self.spool.counts()
        return sum(counts[state] for state in ("receiving", "queued", "working", "sending"))

    def complete(self, quiet_time: float, expect: int | None) -> list[Path]:
        """Series that had no image for `quiet_time` s, or have `expect` images."""
        with self._lock:
            return [
                job
                for job in self.spool.jobs("receiving")
                if self._silence(job) >= quiet_time
                or (expect is not None and len(self.spool.images(job)) >= expect)
            ]

    def queue(self, job: Path) -> Path:
        """Move a complete series into the queue; late images join those that wait there."""
        with self._lock:
            self._last.pop(job.name, None)
            for waiting in self.spool.jobs("queued"):
                if waiting.name.partition("_")[2] == job.name:
                    try:
                        for image in self.spool.images(job):
                            image.rename(waiting / "images" / image.name)
                    except FileNotFoundError:  # the worker has just taken it
                        break
                    self.spool.drop(job)
                    return waiting
            target = self.spool.state("queued") / f"{time.time_ns():020d}_{job.name}"
            job.rename(target)
            return target

    def keep_out(self, job: Path) -> None:
        """Remove a series that no rule is for."""
        with self._lock:
            self._last.pop(job.name, None)
            self.spool.drop(job)

    def remove_old(self, pattern: str, age: float) -> int:
        """Remove what matches in the spool and has been there for `age` s; returns its number.

        The age of a failed series is that of its `reason.txt`.
        """
        old = [p for p in self.spool.folder.glob(pattern) if time.time() - _written(p) > age]
        for path in old:
            if path.is_dir():
                self.spool.drop(path)
            else:
                path.unlink(missing_ok=True)
        return len(old)

    def _begin(self, job: Path, item: ReceivedObject) -> None:
        """Make the folder of a new series, whole."""
        temporary = job.with_name(f".medsa-{job.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "images").mkdir(parents=True)
        write_bytes(temporary / "source.json", json.dumps(asdict(item)).encode())
        temporary.rename(job)

    def _silence(self, job: Path) -> float:
        """Seconds since a series' last image, or since the node started."""
        now = time.monotonic()
        return now - self._last.setdefault(job.name, now)

    def _recover(self) -> None:
        """Bring back what was interrupted, and remove what was half written."""
        for state in ("receiving", "queued", "working", "sending", "failed", "sent", "prompts"):
            for path in sorted(self.spool.state(state).glob(f"**/{TEMPORARY}")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for trash in self.spool.state("failed").glob(".trash-*"):
            shutil.rmtree(trash, ignore_errors=True)
        for job in self.spool.jobs("receiving"):
            if not self.spool.images(job):
                shutil.rmtree(job)
        requeue(self.spool)


def requeue(spool: Spool) -> None:
    """Put series back into the queue whose worker has ended."""
    for job in spool.jobs("working"):
        shutil.rmtree(job / "results", ignore_errors=True)
        job.rename(spool.state("queued") / job.name)


def _written(path: Path) -> float:
    """When a file of the spool, or a failed series, was put where it is; seconds since 1970."""
    reason = path / "reason.txt"
    return (reason if reason.exists() else path).stat().st_mtime


def _study_key(state: str, name: str) -> str:
    """The study of a series' folder: TIME_STUDY-SERIES, STUDY-SERIES or STUDY_UID."""
    key = name if state in ("receiving", "sending") else name.partition("_")[2]
    return key.partition("_")[0].partition("-")[0]


def _json_line(line: str) -> dict[str, Any] | None:
    """A line of a log; None for one that was cut off."""
    try:
        value: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return value
