"""The stand-ins of TensorRT against the names of the oldest supported version, JetPack 6's 10.3.

Its Python bindings import without a GPU once libraries of their names offer nine functions. They
are downloaded, 1 MB, and nothing of TensorRT runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from types import ModuleType

import fake_gpu
import pytest
from fake_gpu import Machine
from test_stand_ins import DESCRIBE, FAKE_BUILDER, differences, names

BINDINGS = "tensorrt-cu12-bindings==10.3.0"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
OF_RTX = ("IRuntimeCache", "IRuntimeConfig", "CudaGraphStrategy", "ICudaEngine.create_runtime_")
"""Beginnings of names that the runtime asks of TensorRT-RTX alone."""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every name of TensorRT 10.3 → its docstring."""
    folder = tmp_path_factory.mktemp("tensorrt")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, BINDINGS]
    done = subprocess.run([*download, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{BINDINGS} cannot be downloaded here: {done.stderr[-200:]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    source = folder / "functions.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        soname = f"lib{library}.so.10"
        command = ["gcc", "-shared", "-fPIC", source, "-o", folder / soname]
        subprocess.run([*command, f"-Wl,-soname,{soname}"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", DESCRIBE, "tensorrt_bindings"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    described: dict[str, str] = json.loads(done.stdout)
    return described


@pytest.mark.slow
def test_a_build_asks_for_names_that_the_oldest_version_has(
    oldest: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT", "10.3.0")
    library = ModuleType("builder")
    path = FAKE_BUILDER / "tensorrt" / "__init__.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(library))
    assert list(differences(library, oldest)) == []
    assert len(list(names(library))) > 80


@pytest.mark.slow
def test_a_session_asks_for_names_that_the_oldest_version_has(
    oldest: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_gpu.tensorrt_runtime(Machine(), "tensorrt", "10.3.0")
    missing = [line for line in differences(library, oldest) if not line.startswith(OF_RTX)]
    assert missing == []
    assert "ICudaEngine.device_memory_size_v2" in oldest
    assert "RuntimeConfig" not in "".join(oldest), "those of OF_RTX are newer"
