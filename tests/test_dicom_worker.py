"""The worker of the DICOM node, in this process: what becomes of series it cannot segment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicom_network import WHOLE_TEMPLATE, ct_series, write_rules
from fake_network import bright_pixels
from pydicom.filebase import DicomBytesIO

from medsa_deploy.dicom_node import segmenting
from medsa_deploy.dicom_node.received import received_object
from medsa_deploy.dicom_node.segmenting import Worker, WorkerJob
from medsa_deploy.dicom_node.spool import Inbox, QueueFullError, Spool, requeue
from medsa_deploy.errors import DeviceLostError, ImageError


class Bench:
    """A spool with a worker on a network that finds bright pixels."""

    def __init__(self, folder: Path, *rules: dict[str, Any]) -> None:
        self.spool = Spool(folder / "spool")
        self.inbox = Inbox(self.spool, most_series=9)
        self.notes: list[dict[str, Any]] = []
        bundle = folder / "fake.medsa"
        job = WorkerJob(
            spool=str(self.spool.folder),
            rules=str(write_rules(folder, *rules)),
            bundle=str(bundle),
            session={},
            prompt_wait=0.0,
            running="",
        )
        self.worker = Worker(job, self.notes.append)
        self.worker._sessions[bundle] = bright_pixels()

    def receive(self, count: int = 2, **attributes: Any) -> Path:
        """A series in the queue."""
        for dataset in ct_series(count, **attributes):
            buffer = DicomBytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            content = buffer.getvalue()
            self.inbox.store(received_object(content, "SCANNER"), content)
        (job,) = self.inbox.complete(0, None)
        return self.inbox.queue(job)

    def result(self) -> Any:
        """What the worker said of the last series."""
        assert self.worker.step()
        return self.notes[-1]["result"]

    def jobs(self, state: str) -> list[str]:
        return [job.name for job in self.spool.jobs(state)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path, WHOLE_TEMPLATE)
    yield opened
    opened.inbox.close()


def test_a_series_moves_from_the_queue_to_the_sender(bench: Bench) -> None:
    assert not bench.worker.step()
    bench.receive()
    assert bench.result() == "segmented"
    (sending,) = bench.spool.jobs("sending")
    assert [path.name for path in (sending / "results").iterdir()] == ["segmentation.dcm"]
    assert not (sending / "images").exists()
    outcome = json.loads((sending / "outcome.json").read_text())
    assert (outcome["images"], outcome["calling_aet"]) == (2, "SCANNER")


def test_a_sender_may_be_faster_than_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def after_the_sender(path: Path, *, ignore_errors: bool) -> None:
        for job in bench.spool.jobs("sending"):
            remove(job)
        remove(path, ignore_errors=ignore_errors)

    bench.receive()
    monkeypatch.setattr(segmenting.shutil, "rmtree", after_the_sender)
    assert bench.result() == "segmented"
    assert bench.jobs("queued") == bench.jobs("working") == []


def test_a_series_that_cannot_be_read_is_kept_with_the_reason(bench: Bench) -> None:
    queued = bench.receive(3)
    bench.spool.images(queued)[1].write_bytes(b"no DICOM")
    assert bench.result() == "failed"
    assert bench.jobs("failed") == [queued.name]
    reason = (bench.spool.state("failed") / queued.name / "reason.txt").read_text()
    assert "does not look like DICOM" in reason
    assert bench.notes[-1]["error_kind"] == "ImageError"
    ((study, (outcome,)),) = bench.spool.finished_studies()
    assert (outcome["result"], len(study)) == ("failed", 16)


def test_a_full_disk_and_a_lost_device_put_a_series_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def lose(*values: Any, **options: Any) -> None:
        raise DeviceLostError("the device is gone")

    queued = bench.receive()
    with monkeypatch.context() as full:
        full.setattr(segmenting, "write_segmentation", fail)
        assert bench.result() == "postponed"
    assert bench.jobs("queued") == [queued.name]
    assert not bench.worker.step()  # not at once
    bench.worker._not_before.clear()
    with monkeypatch.context() as lost:
        lost.setattr(segmenting, "segment_volume", lose)
        with pytest.raises(DeviceLostError):
            bench.worker.step()
    assert bench.jobs("working") == [queued.name]


def test_a_series_that_ends_the_worker_twice_is_put_aside(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*values: Any, **options: Any) -> None:
        raise Killed

    queued = bench.receive()
    monkeypatch.setattr(segmenting, "segment_volume", die)
    for _ in range(2):
        with pytest.raises(Killed):
            bench.worker.step()
        requeue(bench.spool)
    assert bench.result() == "failed"
    assert bench.jobs("failed") == [queued.name]
    assert "ended the worker 2 times" in bench.notes[-1]["error"]


def test_a_network_that_needs_prompts_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"prompts": {"template": "none"}})
    bench.receive()
    assert bench.result() == "failed"
    assert bench.notes[-1]["error_kind"] == "PromptError"
    bench.inbox.close()


def test_a_network_without_prompts_gives_a_segment_for_each_class(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"prompts": {"template": "none"}})
    bench.worker._sessions[tmp_path / "fake.medsa"] = bright_pixels(
        classes=2, outputs="labels", prompts="none", postprocess="samed", names=("grey", "white")
    )
    bench.receive()
    assert bench.result() == "segmented"
    (sending,) = bench.spool.jobs("sending")
    segmentation = pydicom.dcmread(sending / "results" / "segmentation.dcm")
    assert [item.SegmentLabel for item in segmentation.SegmentSequence] == ["grey", "white"]
    bench.inbox.close()


def test_late_images_join_a_series_that_waits(bench: Bench) -> None:
    first, late = ct_series(2)
    for dataset in (first, late):
        buffer = DicomBytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        bench.inbox.store(received_object(buffer.getvalue(), "A"), buffer.getvalue())
        (job,) = bench.inbox.complete(0, None)
        queued = bench.inbox.queue(job)
    assert bench.jobs("queued") == [queued.name]
    assert len(bench.spool.images(queued)) == 2


def test_a_spool_recovers_what_was_interrupted(bench: Bench, tmp_path: Path) -> None:
    queued = bench.receive()
    work = bench.spool.state("working") / queued.name
    queued.rename(work)
    (work / "results").mkdir()
    (work / "results" / ".medsa-123.dcm").write_bytes(b"half")
    (bench.spool.state("receiving") / ".medsa-new").mkdir()
    (bench.spool.state("receiving") / "empty" / "images").mkdir(parents=True)
    (bench.spool.state("failed") / ".trash-a").mkdir()
    bench.inbox.close()
    again = Inbox(bench.spool, most_series=1)
    assert bench.jobs("queued") == [queued.name]
    assert not (bench.spool.state("queued") / queued.name / "results").exists()
    assert not list(bench.spool.state("receiving").iterdir())
    assert not list(bench.spool.state("failed").iterdir())
    buffer = DicomBytesIO()
    ct_series(1)[0].save_as(buffer, enforce_file_format=True)
    with pytest.raises(QueueFullError, match="1 series wait"):
        again.store(received_object(buffer.getvalue(), "A"), buffer.getvalue())
    again.close()


def test_old_prompts_are_removed(bench: Bench) -> None:
    folder = bench.spool.state("prompts") / "study"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(b"")
    assert bench.inbox.remove_old("prompts/*/*", 60) == 0
    assert bench.inbox.remove_old("prompts/*/*", -1) == 1


def test_what_is_over_stays_for_its_days(bench: Bench) -> None:
    for name, days in (("old", 31), ("new", 29)):
        job = bench.spool.state("failed") / name
        (job / "images").mkdir(parents=True)
        (job / "reason.txt").write_text("no series\n")
        record = bench.spool.state("sent") / f"{name}.json"
        record.write_text("{}\n")
        written = time.time() - days * 86_400
        for path in (job / "reason.txt", record):
            os.utime(path, (written, written))
    for state in ("failed", "sent"):
        assert bench.inbox.remove_old(f"{state}/[!.]*", 30 * 86_400) == 1
    assert [p.name for p in bench.spool.folder.glob("failed/*")] == ["new"]
    assert [p.name for p in bench.spool.folder.glob("sent/*")] == ["new.json"]


@pytest.mark.parametrize("content", [b"", b"x" * 200, b"\0" * 128 + b"DICM" + b"\xff" * 50])
def test_damaged_objects_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="the object"):
        received_object(content, "A")
