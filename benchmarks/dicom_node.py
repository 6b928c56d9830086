"""Throughput, delay and memory of the DICOM node: `dicom-node` as a process, a PACS beside it.

    python benchmarks/dicom_node.py ckpt.medsa     → benchmarks/results/dicom_node.json

Each case sends series of a real CT image, copied and shifted to slices, over one association for
each series. The next series is sent when the one before has arrived (one after another), or at once
(a burst). Delays are from a series' last image to its segmentation in the PACS. The quiet time is
not part of them: the node knows the number of images (`--expect`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, SegmentationStorage

from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "dicom_node.json"
CASES = (
    ("one after another", 200, 3, 128, False),
    ("one after another", 6, 30, 512, False),
    ("in a burst", 6, 30, 512, True),
)
"""Name, series, slices, side of a slice in pixels, and whether all are sent at once."""
EARLY = 20
"""Series after which memory is compared with that at the end; half of them if there are fewer."""


class Pacs:
    """A storage SCP that notes when each study's segmentation came."""

    def __init__(self) -> None:
        self.arrived: dict[str, float] = {}
        self.changed = threading.Condition()
        ae = AE(ae_title="PACS")
        ae.add_supported_context(SegmentationStorage)
        self.server = ae.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        self.port: int = self.server.server_address[1]

    def _store(self, event: Any) -> int:
        with self.changed:
            self.arrived[str(event.dataset.StudyInstanceUID)] = time.perf_counter()
            self.changed.notify_all()
        return 0

    def wait(self, study: str) -> float:
        """When a study's segmentation came."""
        with self.changed:
            self.changed.wait_for(lambda: study in self.arrived, timeout=600)
            return self.arrived[study]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def template(side: int) -> Dataset:
    """A real CT image, repeated to `side` pixels."""
    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    repeats = side // dataset.Rows
    pixels = np.tile(dataset.pixel_array, (repeats, repeats))
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = pixels.tobytes()
    dataset.pop("SpacingBetweenSlices", None)
    return dataset


def send_series(port: int, dataset: Dataset, slices: int) -> tuple[str, float]:
    """Send a new series; returns its study and when the last image was taken."""
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid()
    ae = AE(ae_title="SCANNER")
    ae.add_requested_context(CTImageStorage, [ExplicitVRLittleEndian])
    association = ae.associate("127.0.0.1", port, ae_title="MEDSA")
    for k in range(slices):
        dataset.ImagePositionPatient, dataset.InstanceNumber = [0, 0, 2.0 * k], k + 1
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        if association.send_c_store(dataset).Status != 0:
            raise SystemExit("the node refused an image")
    association.release()
    return str(dataset.StudyInstanceUID), time.perf_counter()


def memory_mb(process: int) -> dict[str, float]:
    """Resident memory of the node and of its worker."""
    pids = {"node": process}
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"medsa_deploy.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                pids["worker"] = int(child)
    pages = {
        name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for name, pid in pids.items()
    }
    return {name: round(count * 4096 / 2**20, 1) for name, count in pages.items()}


def measure(bundle: Path, name: str, series: int, slices: int, side: int, burst: bool) -> Any:
    """One case, with a node of its own."""
    pacs, dataset = Pacs(), template(side)
    with tempfile.TemporaryDirectory() as folder:
        rules, port = Path(folder) / "rules.json", free_port()
        rules.write_text('{"rules": [{"prompts": {"template": "whole"}}]}')
        command = [
            *(sys.executable, "-m", "medsa_deploy.cli", "dicom-node", str(bundle.resolve())),
            *("--rules", str(rules), "--spool", f"{folder}/spool", "--port", str(port)),
            *("--send", f"127.0.0.1:{pacs.port}:PACS", "--http-port", "0"),
            *("--expect", str(slices), "--max-queue", str(series + 2)),
        ]
        with (Path(folder) / "log").open("wb") as log:
            node = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.1)
            pacs.wait(send_series(port, dataset, slices)[0])  # loads the bundle
            sent, memory = [], {}
            start = time.perf_counter()
            for count in range(1, series + 1):
                sent.append(send_series(port, dataset, slices))
                if not burst:
                    pacs.wait(sent[-1][0])
                if count == min(EARLY, series // 2):
                    memory["early"] = memory_mb(node.pid)
            delays = [pacs.wait(study) - last for study, last in sent]
            seconds = time.perf_counter() - start
            memory["end"] = memory_mb(node.pid)
        finally:
            node.terminate()
            node.wait()
            pacs.server.shutdown()
    return {
        "name": name,
        "series": series,
        "slices": slices,
        "side": side,
        "series_per_minute": round(60 * series / seconds, 1),
        "delay_s": [round(delay, 3) for delay in delays],
        "median_delay_s": round(statistics.median(delays), 2),
        "longest_delay_s": round(max(delays), 2),
        "memory_mb": memory,
    }


def main() -> None:
    """Measure all cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    machine = diagnose()
    cases = []
    for case in CASES:
        cases.append(measure(bundle, *case))
        print(json.dumps(cases[-1]), flush=True)
    result = {
        "what": "the node with the demonstration bundle, whole image as prompt, on loopback; "
        "sender, PACS and node share the machine",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "versions": {name: version(name) for name in ("onnxruntime", "pynetdicom", "highdicom")},
        "load": round(os.getloadavg()[2], 1),
        "cases": cases,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
