"""Time and memory of `run` on a volume of 512×512×200, beyond what the network itself takes.

    python benchmarks/volume_memory.py     → benchmarks/results/volume_memory.json

A small 3D network (two blocks, chunks of 4 slices, seeded weights) segments three structures of a
NIfTI and of a DICOM series. Each run is a process of its own. Its memory is measured when the
bundle is loaded, when one chunk has been encoded and prompted, so that the network has what it
works in, and at its highest.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import torch
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from medsa_deploy import load, stages
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.runtime import Structure, VolumeOptions
from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "volume_memory.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SHAPE = (512, 512, 200)
CHUNK = 4
CASES: tuple[tuple[int, str, str, bool], ...] = (
    (256, "ct.nii.gz", "seg.nii.gz", False),
    (256, "series", "seg.dcm", True),
    (1024, "series", "seg.dcm", False),
)
"""Image size, volume, output, and whether masks are followed; else the boxes hold every slice."""


def bundle(folder: Path, image_size: int) -> None:
    """A bundle of the first two blocks of a golden case, the second one global."""
    sys.path.insert(0, str(GOLDEN))
    import seeded

    golden = json.loads((GOLDEN / "medsa_3d_chunk6.json").read_text())
    keys = {}
    for name, shape in golden["keys"].items():
        if ".blocks.1.attn.rel_" in name:
            keys[name] = [2 * (image_size // 16) - 1, shape[1]]
        elif ".blocks." not in name or name.split(".")[2] in "01":
            keys[name] = shape
    state = seeded.state_dict(keys, 5, rel_pos_scale=0.2)
    path = folder / f"{image_size}.pth"
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    stages.export_checkpoint(
        path,
        output=None,
        base=None,
        images=None,
        overrides=Overrides(depth_chunk=CHUNK, global_blocks=(1,), image_size=image_size),
        force=True,
    )


def ct() -> np.ndarray:
    """A sphere in noise, (512, 512, 200) int16."""
    noise = np.random.default_rng(0)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    plane = x[:, None] ** 2 + y**2
    slices = [900 * (plane + height**2 < 0.4) + noise.normal(-300, 40, plane.shape) for height in z]
    return np.stack(slices, axis=2).astype(np.int16)


def write_series(folder: Path, array: np.ndarray) -> None:
    """`array` as a CT series."""
    folder.mkdir()
    blank = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    series = generate_uid()
    for k in range(array.shape[2]):
        dataset = copy.deepcopy(blank)
        dataset.Columns, dataset.Rows = array.shape[:2]
        dataset.PixelData = (array[..., k].T + 1024).astype("<i2").tobytes()
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = series, generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.ImagePositionPatient, dataset.PixelSpacing = [0, 0, 1.5 * k], [0.8, 0.8]
        dataset.save_as(folder / f"{k:03}.dcm")


def structures(propagate: bool) -> list[Structure]:
    """Three boxes in every slice, or in the middle one."""
    first, last = (100, 101) if propagate else (0, SHAPE[2])
    return [
        Structure(boxes=((0, 0, first, 512, 512, last),), name="everything"),
        Structure(boxes=((100, 90, first, 400, 420, last),), name="sphere"),
        Structure(boxes=((200, 200, first, 300, 330, last),), name="core"),
    ]


def megabytes(field: str) -> float:
    """VmRSS: memory now; VmHWM: its highest since it was last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def measure(bundle: str, volume: str, output: str, propagate: bool) -> dict[str, Any]:
    """One run, in this process."""
    with load(bundle) as session:
        loaded = megabytes("VmRSS")
        pixels = np.random.default_rng(1).integers(0, 255, (CHUNK, 512, 512), np.uint8)
        embedding = session.encode_slices(list(pixels))[0]
        boxes = [[0, 0, 512, 512], [90, 100, 420, 400], [200, 200, 330, 300]]
        session.segment(embedding, box=boxes)
        del embedding, pixels
        working = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        result = stages.segment_volume_file(
            session,
            Path(volume),
            structures(propagate),
            VolumeOptions(propagate=propagate, intensity_window=(-300, 700)),
            mask=Path(output),
        )
        seconds = time.perf_counter() - start
        peak = megabytes("VmHWM")
    return {
        "slices": len(result.slices),
        "seconds": round(seconds, 1),
        "network_seconds": round(sum(result.timings_ms.values()) * len(result.slices) / 1000, 1),
        "loaded_mb": round(loaded),
        "working_mb": round(working),
        "peak_mb": round(peak),
        "beyond_loaded_mb": round(peak - loaded),
        "beyond_working_mb": round(peak - working),
    }


def prepare(folder: Path) -> None:
    """Make the volume, as NIfTI and as a series, and the bundles."""
    array = ct()
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 1.5, 1])), folder / "ct.nii.gz")
    write_series(folder / "series", array)
    del array
    for size in (256, 1024):
        bundle(folder, size)


def samples(folder: Path) -> list[dict[str, Any]]:
    """Every case, in a process of its own."""
    results = []
    for size, volume, output, propagate in CASES:
        arguments = [folder / f"{size}.medsa", folder / volume, folder / output, propagate]
        command = [sys.executable, __file__, "--one", *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        case = {"image_size": size, "volume": volume, "output": output, "propagate": propagate}
        results.append(case | json.loads(done.stdout))
        print(results[-1], file=sys.stderr)
    return results


def write(results: list[dict[str, Any]]) -> None:
    """The figures, and what they were measured with."""
    machine = diagnose()
    result = {
        "what": "run of 512×512×200 int16, three structures; small 3D network of two blocks in "
        "chunks of 4 slices, seeded weights; beyond the network is the peak without what the "
        "network itself takes for a chunk",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "system": platform.platform(),
        "versions": {n: version(n) for n in ("onnxruntime", "numpy", "nibabel", "highdicom")},
        "samples": results,
    }
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Run every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("BUNDLE", "VOLUME", "OUTPUT", "PROPAGATE"))
    if case := parser.parse_args().one:
        print(json.dumps(measure(*case[:3], case[3] == "True")))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        write(samples(Path(name)))


if __name__ == "__main__":
    main()
