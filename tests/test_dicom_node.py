"""The DICOM node: series in, segmentations back; what it refuses; what it survives."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_network import (
    SOCKETS_LEFT,
    WHOLE_TEMPLATE,
    FakePacs,
    RunningNode,
    ct_series,
    echo,
    free_port,
    in_background,
    node_process,
    running_node,
    send,
    wait_until,
    write_rules,
)
from dicom_tools import check_iod, program
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import (
    CTImageStorage,
    RTStructureSetStorage,
    TwelveLeadECGWaveformStorage,
)

from medsa_deploy.dicom_node import sender
from medsa_deploy.dicom_node.receiver import client_context
from medsa_deploy.errors import UsageError
from medsa_deploy.machine import resident_bytes

pytestmark = SOCKETS_LEFT
RULES = (
    {"match": {"series_description": "*prompted*"}, "prompts": {"template": "study"}},
    {"match": {"series_description": "*PORTAL*", "calling_aet": "SCAN*"}, **WHOLE_TEMPLATE,
     "measurements": True},
    {"match": {"series_description": "relative"}, "propagate": True, "intensity_window": "auto",
     "prompts": {"relative": True, "structures": [
         {"name": "spleen", "boxes": [[0.2, 0.2, 0.3, 0.8, 0.8, 0.7]], "colour": "#ff0000"}]}},
)  # fmt: skip
SECRETS = ("Secret", "SECRET-ID", "Abdomen", "portal")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Those sockets are collected in the test that left them."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def pacs() -> Iterator[FakePacs]:
    server = FakePacs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def node(
    bundle: Path, pacs: FakePacs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningNode]:
    """A node that the tests below share; each waits until it is idle."""
    folder = tmp_path_factory.mktemp("node")
    rules = write_rules(folder, *RULES)
    with running_node(folder, bundle, pacs, rules=rules, prompt_wait=3, max_queue=3) as running:
        yield running


def delivered(node: RunningNode, pacs: FakePacs, series: list[Dataset]) -> list[Dataset]:
    """What the PACS got for a study, once the node is idle."""
    wait_until(node.idle)
    return [d for d in pacs.stored if d.StudyInstanceUID == series[0].StudyInstanceUID]


def sources(segmentation: Dataset) -> set[str]:
    """The images that a segmentation refers to."""
    (series,) = segmentation.ReferencedSeriesSequence
    return {str(i.ReferencedSOPInstanceUID) for i in series.ReferencedInstanceSequence}


def instances(series: list[Dataset]) -> set[str]:
    return {str(dataset.SOPInstanceUID) for dataset in series}


def test_it_answers_by_its_name(node: RunningNode) -> None:
    assert echo(node.port) == 0
    assert echo(node.port, called="OTHER") is None
    assert json.loads(node.get("/healthz"))["status"] == "ok"


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_a_series_becomes_a_segmentation_in_the_pacs(
    node: RunningNode, pacs: FakePacs, name: str, tmp_path: Path
) -> None:
    series = ct_series(3, name=name)
    assert send(node.port, series) == [0, 0, 0]
    segmentation, report = delivered(node, pacs, series)
    assert (segmentation.Modality, report.Modality) == ("SEG", "SR")
    assert sources(segmentation) == instances(series)
    (segment,) = segmentation.SegmentSequence
    assert segment.SegmentLabel == "liver"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"
    for dataset in (segmentation, report):
        assert dataset.PatientID == "SECRET-ID"
        path = tmp_path / f"{dataset.Modality}.dcm"
        dataset.save_as(path, implicit_vr=False, little_endian=True)
        check_iod(path)


def test_the_same_study_twice_is_segmented_once(node: RunningNode, pacs: FakePacs) -> None:
    series = ct_series(2)
    send(node.port, series)
    first = delivered(node, pacs, series)
    send(node.port, list(reversed(series)))
    assert delivered(node, pacs, series) == first
    assert len(first) == 2
    # The worker's notes come through a pipe, and may be later than the node is idle.
    wait_until(
        lambda: (
            [line["result"] for line in node.named("segmented")][-2:]
            == ["segmented", "already sent"]
        )
    )


def test_studies_may_come_interleaved_and_images_more_than_once(
    node: RunningNode, pacs: FakePacs
) -> None:
    first, second = ct_series(3), ct_series(2, name="MR_small.dcm")
    pairs = zip_longest(first, second)
    mixed = [dataset for dataset in chain(*pairs, first[:1]) if dataset is not None]
    assert set(send(node.port, mixed)) == {0}
    for series in (first, second):
        segmentation = delivered(node, pacs, series)[0]
        assert sources(segmentation) == instances(series)


def test_an_association_that_is_aborted_midway_loses_nothing(
    node: RunningNode, pacs: FakePacs
) -> None:
    series = ct_series(3)
    ae = AE(ae_title="SCANNER")
    ae.add_requested_context(CTImageStorage, [ExplicitVRLittleEndian])
    association = ae.associate("127.0.0.1", node.port, ae_title="MEDSA")
    assert association.send_c_store(series[0]).Status == 0
    association.abort()
    assert send(node.port, series) == [0, 0, 0]
    segmentations = [d for d in delivered(node, pacs, series) if d.Modality == "SEG"]
    assert [sources(segmentation) for segmentation in segmentations] == [instances(series)]
    assert node.named("aborted")


def test_a_wrong_class_is_not_negotiated_and_a_damaged_object_is_refused(
    node: RunningNode, pacs: FakePacs
) -> None:
    waveform = ct_series(1)[0]
    waveform.SOPClassUID = TwelveLeadECGWaveformStorage
    assert send(node.port, [waveform]) == []
    (nameless,) = ct_series(1)
    nameless.SeriesInstanceUID = ""
    assert send(node.port, [nameless]) == [0xC000]
    wait_until(node.idle)
    assert 'medsa_images_refused_total{reason="not understood"}' in node.get("/metrics")


def test_a_series_without_a_rule_is_kept_out(node: RunningNode, pacs: FakePacs) -> None:
    for attributes, calling in (({"SeriesDescription": "scout"}, "SCANNER"), ({}, "OTHER")):
        series = ct_series(2, **attributes)
        assert send(node.port, series, calling=calling) == [0, 0]
        assert delivered(node, pacs, series) == []
    assert [line["reason"] for line in node.named("kept out")] == ["no rule matches"] * 2
    assert 'medsa_series_total{result="kept_out"} 2' in node.get("/metrics")


def test_relative_prompts_are_followed(node: RunningNode, pacs: FakePacs) -> None:
    series = ct_series(4, SeriesDescription="relative")
    send(node.port, series)
    (segmentation,) = delivered(node, pacs, series)
    (segment,) = segmentation.SegmentSequence
    assert segment.SegmentLabel == "spleen"
    assert tuple(segment.RecommendedDisplayCIELabValue) != ()


def structure_set(series: list[Dataset]) -> Dataset:
    """An RTSTRUCT with a rectangle on slice 1, and a click on slice 0, of two structures."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.StudyInstanceUID, dataset.Modality = series[0].StudyInstanceUID, "RTSTRUCT"
    referenced, study, frame = Dataset(), Dataset(), Dataset()
    referenced.SeriesInstanceUID = series[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence = [referenced]
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    spacing = np.array([*map(float, series[0].PixelSpacing[::-1]), 2.5])
    corners = np.array([[10, 12, 1], [90, 12, 1], [90, 80, 1], [10, 80, 1]]) * spacing
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, kind, points) in enumerate(
        (
            ("left kidney", "CLOSED_PLANAR", corners),
            ("spleen", "POINT", np.array([[40, 50, 0]]) * spacing),
            ("spleen background", "POINT", np.array([[5, 5, 0]]) * spacing),
        ),
        1,
    ):
        roi, contours, contour = Dataset(), Dataset(), Dataset()
        roi.ROINumber = contours.ReferencedROINumber = number
        roi.ROIName = name
        contour.ContourGeometricType = kind
        contour.NumberOfContourPoints = len(points)
        contour.ContourData = [f"{v:.4f}" for v in points.ravel()]
        contours.ContourSequence = [contour]
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(contours)
    return dataset


def test_prompts_come_with_the_study(node: RunningNode, pacs: FakePacs) -> None:
    series = ct_series(3, SeriesDescription="prompted")
    send(node.port, series)
    send(node.port, [structure_set(series)])
    (segmentation,) = delivered(node, pacs, series)
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["left kidney", "spleen"]
    assert {s.SegmentAlgorithmType for s in segmentation.SegmentSequence} == {"SEMIAUTOMATIC"}


def test_prompts_that_do_not_come_are_waited_for(node: RunningNode, pacs: FakePacs) -> None:
    series = ct_series(2, SeriesDescription="prompted")
    send(node.port, series)
    assert delivered(node, pacs, series) == []
    (failed,) = node.spool.jobs("failed")
    assert "no prompts came with the study" in (failed / "reason.txt").read_text()
    assert 'medsa_series_total{result="failed"} 1' in node.get("/metrics")


def test_more_series_than_the_queue_holds_are_refused(node: RunningNode, pacs: FakePacs) -> None:
    datasets = [ct_series(1)[0] for _ in range(4)]
    statuses = send(node.port, datasets)
    assert statuses == [0, 0, 0, 0xA700]
    assert send(node.port, datasets[:1]) == [0]  # of a series that has begun
    wait_until(node.idle)
    assert send(node.port, datasets[3:]) == [0]
    wait_until(node.idle)
    assert 'medsa_images_refused_total{reason="queue full"} 1' in node.get("/metrics")


def garbage(count: int, seed: int) -> Iterator[bytes]:
    """Random bytes, and the beginnings of PDUs whose lengths and contents are random."""
    numbers = random.Random(seed)
    for _ in range(count):
        body = numbers.randbytes(numbers.randrange(0, 200))
        length = numbers.choice([len(body), len(body) + 50, 2**32 - 1, numbers.randrange(2**32)])
        head = bytes([numbers.randrange(0, 9), 0]) + length.to_bytes(4, "big")
        yield body if numbers.random() < 0.3 else head + body


def throw(port: int, contents: Iterator[bytes]) -> None:
    """Open a connection for each content, write it, and leave."""
    for content in contents:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as s:
            s.sendall(content)


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_garbage_on_the_port_is_bounded(
    node: RunningNode, pacs: FakePacs, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest would keep the backtraces of every connection in this process, whose memory is judged.
    caplog.set_level(logging.CRITICAL + 1, logger="pynetdicom")
    throw(node.port, garbage(20, seed=1))
    before = resident_bytes()
    throw(node.port, garbage(count, seed=2))
    with socket.create_connection(("127.0.0.1", node.port), 5) as half:
        half.sendall(b"\x01\0\xff\xff\xff\xff" + bytes(64))  # announces 4 GB
        half.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while half.recv(64):
                pass  # the node closes it
    assert resident_bytes() - before < 64e6
    assert wait_until(lambda: echo(node.port) == 0)
    series = ct_series(2)
    assert send(node.port, series) == [0, 0]
    assert len(delivered(node, pacs, series)) == 2
    assert not node.node.faults()


def test_failed_series_stay_for_their_days(bundle: Path, tmp_path: Path) -> None:
    for name, hours in (("old", 49), ("new", 47)):
        reason = tmp_path / "spool" / "failed" / name / "reason.txt"
        reason.parent.mkdir(parents=True)
        reason.write_text("no series\n")
        written = time.time() - 3600 * hours
        os.utime(reason, (written, written))
    with running_node(tmp_path, bundle, None, to_web="http://127.0.0.1:9", keep_days=2) as node:
        wait_until(lambda: node.named("expired"))
        assert [job.name for job in node.spool.jobs("failed")] == ["new"]


def test_logs_and_audit_have_no_patient_data(node: RunningNode, pacs: FakePacs) -> None:
    send(node.port, ct_series(2, Modality="SECRET_ID"))
    wait_until(lambda: "an unknown code" in node.text)
    series = ct_series(2)
    send(node.port, series)
    uid = delivered(node, pacs, series)[0].SOPInstanceUID
    lines = wait_until(
        lambda: [
            line
            for line in (node.spool.folder / "audit.jsonl").read_text().splitlines()
            if str(uid) in line
        ]
    )
    (outcome,) = json.loads(lines[0])["series"]
    assert (outcome["result"], outcome["images"], outcome["rule"]) == ("sent", 2, 2)
    assert len(outcome["bundle_sha256"]) == 64
    assert outcome["calling_aet"] == "SCANNER"
    written = node.text + (node.spool.folder / "audit.jsonl").read_text()
    identifying = [*SECRETS, "SECRET_ID", series[0].StudyInstanceUID, series[0].SeriesInstanceUID]
    assert not [text for text in identifying if text in written]
    assert node.spool.folder.stat().st_mode & 0o077 == 0


def test_a_spool_has_one_node(node: RunningNode, bundle: Path, pacs: FakePacs) -> None:
    folder = node.spool.folder.parent
    with (
        pytest.raises(UsageError, match="in use by another node"),
        running_node(folder, bundle, pacs, rules=folder / "rules.json"),
    ):
        pass


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_tls_titles_and_identifiers_by_choice(bundle: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "node")
    stranger = certificate(tmp_path, "stranger")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    pacs = FakePacs(tls=server)
    options = {
        "tls_certificate": cert, "tls_key": key, "tls_authority": cert, "send_tls": True,
        "allow": ("SCANNER",), "log_identifiers": True, "expect": 2, "quiet_time": 600,
    }  # fmt: skip
    with running_node(tmp_path, bundle, pacs, **options) as node:
        known = client_context(cert, key, cert)
        with socket.create_connection(("127.0.0.1", node.port)):  # says nothing, and stops nobody
            assert send(node.port, ct_series(1)) == []  # no TLS
            assert send(node.port, ct_series(1), tls=client_context(*stranger, cert)) == []
            assert send(node.port, ct_series(1), calling="OTHER", tls=known) == []
            series = ct_series(2)
            assert send(node.port, series, tls=known) == [0, 0]
        wait_until(lambda: pacs.stored)
        assert sources(pacs.stored[0]) == instances(series)
        assert "SECRET-ID" in node.text
    pacs.close()


def test_a_pacs_that_is_down_or_refuses_gets_it_later(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "FIRST_WAIT", 0.1)
    pacs = FakePacs()
    port, series = pacs.port, ct_series(2)
    pacs.close()
    with running_node(tmp_path, bundle, pacs) as node:
        send(node.port, series)
        wait_until(lambda: len(node.named("not sent")) >= 2)
        assert not node.node.faults()
        again = FakePacs(port)
        again.statuses = [0xA700, 0x0110]
        wait_until(lambda: again.stored)
        wait_until(node.idle)
        assert len(again.stored) == 1
        again.statuses = [0xA900] * 9
        refused = ct_series(2)
        send(node.port, refused)
        wait_until(lambda: node.named("given up"))
        (failed,) = node.spool.jobs("failed")
        assert (failed / "results" / "segmentation.dcm").exists()
        again.close()


def worker_of(process: int) -> int | None:
    """The process that a node's worker is."""
    children = Path(f"/proc/{process}/task")
    for task in children.iterdir():
        for child in (task / "children").read_text().split():
            if b"medsa_deploy.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def test_nothing_is_lost_or_sent_twice_by_kill_9(bundle: Path, tmp_path: Path) -> None:
    """While images come in, while a series is segmented, and while it is sent."""
    write_rules(tmp_path)
    pacs = FakePacs()
    series, target = ct_series(3), pacs.target
    pacs.close()
    spool = tmp_path / "spool"

    def any_in(state: str) -> bool:
        return any(not p.name.startswith(".") for p in (spool / state).iterdir())

    def start() -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return node_process(tmp_path, bundle, port, target)

    port = free_port()
    with start() as process:
        assert send(port, series[:2]) == [0, 0]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert any_in("receiving")
    with start() as process:
        assert send(port, series[2:]) == [0]
        wait_until(lambda: any_in("working"))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not any_in("sending")
    with start() as process:
        wait_until(lambda: any_in("sending"))
        process.send_signal(signal.SIGKILL)
        process.wait()
    pacs = FakePacs(int(target.split(":")[1]))
    with start() as process:
        wait_until(lambda: pacs.stored)
        worker = worker_of(process.pid)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        more = ct_series(2)
        assert send(port, [*more, *series]) == [0] * 5
        wait_until(lambda: len(pacs.stored) == 2)
        wait_until(lambda: not any(map(any_in, ("receiving", "queued", "working", "sending"))))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    totals = json.loads((tmp_path / "totals.json").read_text())
    assert totals == {"images": 5, "sent": 2, "failed": 0, "kept_out": 0, "waiting": 0}
    assert [sources(d) for d in pacs.stored] == [instances(series), instances(more)]
    outcomes = [json.loads(line) for line in (spool / "audit.jsonl").read_text().splitlines()]
    results = [outcome["result"] for line in outcomes for outcome in line["series"]]
    assert sorted(results) == ["already sent", "sent", "sent"]
    pacs.close()


def test_dcmtk_sends_compressed_series_to_it(bundle: Path, tmp_path: Path) -> None:
    """storescu offers a compressed transfer syntax first, and the node takes it."""
    storescu, storescp = program("storescu"), program("storescp")
    folder, inbox = tmp_path / "series", tmp_path / "inbox"
    folder.mkdir()
    inbox.mkdir()
    for k, dataset in enumerate(ct_series(3)):
        dataset.compress(pydicom.uid.JPEG2000Lossless)
        dataset.save_as(folder / f"{k}.dcm")
    port = free_port()
    scp = subprocess.Popen([storescp, "-od", inbox, "-aet", "PACS", str(port)])
    try:
        options = {"send": (f"127.0.0.1:{port}:PACS",)}
        with running_node(tmp_path, bundle, None, **options) as node:
            command = [storescu, "-v", "-xv", "+C", "-aet", "SCANNER", "-aec", "MEDSA", "127.0.0.1"]
            done = subprocess.run(
                [*command, str(node.port), *map(str, sorted(folder.iterdir()))],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            (path,) = wait_until(lambda: list(inbox.iterdir()))
            wait_until(node.idle)
        check_iod(path)
        assert len(sources(pydicom.dcmread(path))) == 3
    finally:
        scp.kill()
        scp.wait()


@pytest.mark.slow
def test_200_series_keep_memory_flat(bundle: Path, tmp_path: Path) -> None:
    pacs = FakePacs()
    sizes = []
    start = time.monotonic()
    with running_node(tmp_path, bundle, pacs, expect=3, max_queue=300) as node:
        for count in range(1, 201):
            in_background(lambda: send(node.port, ct_series(3))).join()
            if count in (20, 200):
                wait_until(node.idle, 600)
                worker = worker_of(os.getpid())
                pages = Path(f"/proc/{worker}/statm").read_text().split()[1]
                sizes.append((resident_bytes(), int(pages) * 4096))
                pacs.stored.clear()
    print(f"200 series in {time.monotonic() - start:.0f} s; node and worker, bytes: {sizes}")
    for early, late in zip(*sizes, strict=True):
        assert late - early < 60e6
    pacs.close()
