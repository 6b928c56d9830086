"""What the node's tests need around it: a PACS, senders, free ports, a node and what it wrote."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import Comprehensive3DSRStorage, SegmentationStorage, Verification

from medsa_deploy.dicom_node.node import Node, NodeOptions
from medsa_deploy.event_log import EventLog

CALLING = "SCANNER"
SOCKETS_LEFT = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <s\w+\.\w*[sS]ocket:pytest.PytestUnraisableExceptionWarning"
)
"""pynetdicom leaves sockets of broken connections to the garbage collector."""
WHOLE_TEMPLATE = {"prompts": {"template": "whole", "name": "liver"}}
"""A rule for everything: the whole image is the prompt."""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value; the test fails if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := holds():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {holds}")


class FakePacs:
    """A storage SCP that keeps what it gets; `statuses` are answered first, one each."""

    def __init__(self, port: int = 0, *, tls: Any = None) -> None:
        self.stored: list[Dataset] = []
        self.statuses: list[int] = []
        ae = AE(ae_title="PACS")
        ae.add_supported_context(SegmentationStorage)
        ae.add_supported_context(Comprehensive3DSRStorage)
        self._server = ae.start_server(
            ("127.0.0.1", port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._store)],
            ssl_context=tls,
        )
        self.port: int = self._server.server_address[1]

    def _store(self, event: Any) -> int:
        if self.statuses:
            return self.statuses.pop(0)
        self.stored.append(event.dataset)
        return 0

    @property
    def uids(self) -> list[str]:
        """SOP Instance UIDs, in the order they came."""
        return [str(dataset.SOPInstanceUID) for dataset in self.stored]

    @property
    def target(self) -> str:
        """As --send has it."""
        return f"127.0.0.1:{self.port}:PACS"

    def close(self) -> None:
        self._server.shutdown()


def ct_series(
    count: int = 3, *, study: str | None = None, name: str = "CT_small.dcm", **attributes: Any
) -> list[Dataset]:
    """A real image as `count` slices of a new series, each shifted a little."""
    path = get_testdata_file(name, download=False)
    study, series, frame = study or generate_uid(), generate_uid(), generate_uid()
    datasets = []
    for k in range(count):
        dataset = pydicom.dcmread(str(path))
        dataset.decode()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = frame
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [0, 0, 2.5 * k]
        dataset.SliceThickness, dataset.InstanceNumber = 2.5, k + 1
        dataset.pop("SpacingBetweenSlices", None)
        dataset.PixelData = np.roll(dataset.pixel_array, k, axis=1).tobytes()
        dataset.PatientName, dataset.PatientID = "Secret^Person", "SECRET-ID"
        dataset.SeriesDescription = "Abdomen portal"
        for attribute, value in attributes.items():
            setattr(dataset, attribute, value)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        datasets.append(dataset)
    return datasets


def send(
    port: int, datasets: Sequence[Dataset], *, calling: str = CALLING, called: str = "MEDSA",
    tls: Any = None,
) -> list[int]:  # fmt: skip
    """The statuses of C-STOREs over one association; none if it was not accepted."""
    ae = AE(ae_title=calling)
    for uid in {str(dataset.SOPClassUID) for dataset in datasets}:
        ae.add_requested_context(uid, [ExplicitVRLittleEndian])
    association = ae.associate(
        "127.0.0.1", port, ae_title=called, tls_args=None if tls is None else (tls, "localhost")
    )
    if not association.is_established:
        return []
    try:
        return [association.send_c_store(d).get("Status", -1) for d in datasets]
    finally:
        association.release()


def echo(port: int, *, calling: str = CALLING, called: str = "MEDSA") -> int | None:
    """The status of a C-ECHO; None if the association was not accepted."""
    ae = AE(ae_title=calling)
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return None
    try:
        status: int = association.send_c_echo().Status
        return status
    finally:
        association.release()


def write_rules(folder: Path, *rules: dict[str, Any]) -> Path:
    """A file of rules; by default the whole image of everything."""
    path = folder / "rules.json"
    path.write_text(json.dumps({"rules": list(rules) or [WHOLE_TEMPLATE]}))
    return path


class RunningNode:
    """A node in this process, its log, and its files."""

    def __init__(self, node: Node, log: io.StringIO) -> None:
        self.node, self._log = node, log
        self.port = node.receiver.port
        self.spool = node.spool

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        return [json.loads(line) for line in self._log.getvalue().splitlines()]

    def named(self, event: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [line for line in self.events if line["event"] == event]

    @property
    def text(self) -> str:
        """All of the log."""
        return self._log.getvalue()

    def get(self, path: str) -> str:
        """An answer of the health port."""
        address = f"http://127.0.0.1:{self.node.options.http_port}{path}"
        with urllib.request.urlopen(address, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def idle(self) -> bool:
        """Whether no series is on its way."""
        counts = self.spool.counts()
        return not any(counts[state] for state in ("receiving", "queued", "working", "sending"))


@contextmanager
def running_node(
    folder: Path, bundle: Path, pacs: FakePacs | None, *, rules: Path | None = None, **options: Any
) -> Iterator[RunningNode]:
    """A node in this process, with a short quiet time."""
    log = io.StringIO()
    destinations = {} if pacs is None else {"send": (pacs.target,)}
    settings = {"quiet_time": 0.3, "http_port": free_port(), **destinations, **options}
    identifiers = bool(settings.get("log_identifiers"))
    with Node(
        NodeOptions(
            bundle=bundle,
            rules=rules or write_rules(folder),
            spool=folder / "spool",
            port=free_port(),
            **settings,
        ),
        EventLog(log, identifiers=identifiers),
    ) as node:
        yield RunningNode(node, log)


@contextmanager
def node_process(
    folder: Path, bundle: Path, port: int, send_to: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The command itself, in a process of its own; killed at the end unless it has ended."""
    log = (folder / f"node-{time.time_ns()}.log").open("wb")
    command = [
        *(sys.executable, "-m", "medsa_deploy.cli", "dicom-node", bundle),
        *("--rules", folder / "rules.json", "--spool", folder / "spool", "--port", str(port)),
        *("--send", send_to, "--http-port", "0", "--quiet-time", "1.5", "--json"),
    ]
    out = (folder / "totals.json").open("wb")
    process = subprocess.Popen([str(word) for word in command], stderr=log, stdout=out)
    try:
        wait_until(lambda: process.poll() is not None or listens(port))
        assert process.poll() is None, Path(log.name).read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()
        out.close()


def listens(port: int) -> bool:
    """Whether a port answers."""
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex(("127.0.0.1", port)) == 0


def in_background(work: Callable[[], Any]) -> threading.Thread:
    """A thread that has begun."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
