"""Opening engines: files, contracts, static axes, TensorRT-RTX's cache, missing libraries."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_gpu
import pytest
from device_sessions import open_engines
from fake_engines import describe, session_of, write
from fake_gpu import Machine
from fake_network import SIDE

from medsa_deploy import errors
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.runtime import Session


def test_engines_that_are_none_are_named(machine: Machine, plain: Session, folder: Path) -> None:
    del machine.functions["decoder"]
    with pytest.raises(errors.EngineChangedError, match=r"decoder.engine was not loaded: magic"):
        open_engines(plain, folder)
    assert machine.used == machine.pinned == 0


@pytest.mark.tensorrt
def test_the_listener_is_one_that_the_library_takes() -> None:
    """TensorRT-RTX itself, in a process of its own; without a GPU it refuses the engine as well."""
    code = (
        "from medsa_deploy.nvidia import tensorrt_api; library = tensorrt_api.load('rtx');"
        "listener = tensorrt_api.error_logger(library);"
        "print(library.Runtime(listener).deserialize_cuda_engine(b'none' * 99), listener.errors)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("None ['IRuntime::deserializeCudaEngine: Error Code"), done.stderr


def test_engines_of_another_contract_are_refused(
    machine: Machine, plain: Session, folder: Path
) -> None:
    machine.functions["decoder"].tensors["point_labels"] = (-1, 7)
    with pytest.raises(errors.BundleError, match=r"point_labels is float32 \(\*, 7\)"):
        open_engines(plain, folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"points": AxisRange(min=2, opt=2, max=2)},
        {"prompts": AxisRange(min=3, opt=3, max=3)},
        {"embeddings": AxisRange(min=1, opt=1, max=2)},
        {"batch": AxisRange(min=2, opt=2, max=2)},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_axes_that_cannot_vary_are_static_in_the_engine(
    machine: Machine, plain: Session, tmp_path: Path, sizes: dict[str, AxisRange]
) -> None:
    folder = write(tmp_path / "b.medsa" / "engines" / "x", plain.manifest, describe(**sizes))
    with open_engines(plain, folder) as session:
        decoder = session.backend._decoder._engine
        assert (decoder.get_tensor_shape("point_coords")[1] == 2) == ("points" in sizes)
        assert (decoder.get_tensor_shape("low_res_masks")[0] == 3) == ("prompts" in sizes)
        assert (decoder.get_tensor_shape("image_embeddings")[0] == 1) != ("embeddings" in sizes)


def test_a_static_axis_outside_the_profile_is_another_graphs(
    machine: Machine, plain: Session, folder: Path
) -> None:
    tensors = machine.functions["decoder"].tensors
    machine.functions["decoder"].tensors = tensors | {"low_res_masks": (4, 1, SIDE, SIDE)}
    with pytest.raises(errors.BundleError, match=r"low_res_masks is float32 \(4, 1, 60, 60\)"):
        open_engines(plain, folder)


def test_kernels_of_rtx_are_kept(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = fake_gpu.install(monkeypatch, name="tensorrt_rtx")
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe("rtx"))
    open_engines(plain, folder, flavor="rtx").close()
    cache_files = list((tmp_path / "medsa-deploy" / "rtx").iterdir())
    assert [path.read_bytes() for path in cache_files] == [b"compiled kernels"] * len(cache_files)
    assert len(cache_files) == 2
    assert machine.runtime_cache is None
    open_engines(plain, folder, flavor="rtx").close()
    assert machine.runtime_cache == b"compiled kernels"
    assert not list(folder.glob("*cache*"))


def test_kernels_of_rtx_that_cannot_be_kept_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = fake_gpu.install(monkeypatch, name="tensorrt_rtx")
    plain = session_of(machine)
    folder = write(tmp_path / "x", plain.manifest, describe("rtx"))
    session = open_engines(plain, folder, flavor="rtx")

    def write_half(path: Path, data: bytes) -> None:
        with path.open("wb") as f:
            f.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    session.close()
    assert list((tmp_path / "medsa-deploy" / "rtx").iterdir()) == []
    assert machine.used == 0


def test_an_option_of_another_flavor_is_found_by_name(plain: Session, folder: Path) -> None:
    with pytest.raises(errors.EngineFlavorError, match="TensorRT is loaded in this process"):
        open_engines(plain, folder, flavor="rtx")


def test_a_gpu_without_pycuda_names_the_extra(
    machine: Machine, plain: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, extra in (("cuda.bindings", "cuda-bindings"), ("pycuda.driver", "pycuda")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(errors.MissingDependencyError, match=rf"{extra}.*medsa-deploy\[cuda\]"):
            open_engines(plain, folder)
    assert replace(describe(), tf32=True).tf32
