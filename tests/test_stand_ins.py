"""The stand-ins of TensorRT and cuda-bindings against the real libraries, and what they refuse.

TensorRT-RTX has TensorRT's names. It is imported in a process of its own, where the real
cuda-bindings are too: neither needs a GPU for that.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_engines import describe, session_of, write
from fake_gpu import ALIGNMENT, Machine

from medsa_deploy import errors
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.tensorrt import TensorRTBackend

FAKE_BUILDER = Path(__file__).parent / "fake_tensorrt"

DESCRIBE = """
import importlib, inspect, json, sys

def members(owner):
    return {
        name: value
        for name in dir(owner)
        if not name.startswith("_")
        and (value := inspect.getattr_static(owner, name)) is not None
    }

def text(value):
    return getattr(value, "__doc__", None) or ""

library = importlib.import_module(sys.argv[1])
described = {}
for name, value in members(library).items():
    described[name] = text(value)
    if isinstance(value, type):
        for member, inner in members(value).items():
            described[f"{name}.{member}"] = text(inner)
        described[f"{name}.__init__"] = text(value.__init__)
print(json.dumps(described))
"""
"""Prints a library's names, and those of its classes → their docstrings, which hold signatures."""

RENAMED = {
    "Tensor": "ITensor",
    "Layer": "ILayer",
    "Network": "INetworkDefinition",
    "OptimizationProfile": "IOptimizationProfile",
    "TimingCache": "ITimingCache",
    "BuilderConfig": "IBuilderConfig",
}
"""Class of the builder's stand-in → the real name; these are handed out by calls."""
OF_THE_STAND_IN = {"ELEVEN", "NUMBERS", "requests"}
"""Names of the builder's stand-in that no library has."""


def real(module: str) -> dict[str, str]:
    """Every name of an installed library → its docstring."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", DESCRIBE, module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    described: dict[str, str] = json.loads(done.stdout)
    return described


@pytest.fixture(scope="module")
def tensorrt() -> dict[str, str]:
    return real("tensorrt_rtx")


@pytest.fixture(scope="module")
def bindings() -> dict[str, str]:
    return real("cuda.bindings.driver")


def names(stand_in: ModuleType) -> Iterator[tuple[str, object]]:
    """Public names of a stand-in and of its classes, as the real library calls them."""
    for name, value in vars(stand_in).items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        known = RENAMED.get(name, name)
        yield known, value
        if isinstance(value, type):
            yield from ((f"{known}.{n}", v) for n, v in vars(value).items() if n[0] != "_")
            if "__init__" in vars(value) and name == known and not issubclass(value, Enum):
                yield f"{known}.__init__", value.__init__


def arities(signatures: str) -> set[int]:
    """Numbers of arguments that a docstring's signatures take, `self` included."""
    counts = set()
    for arguments in re.findall(r"^(?:\d+\. )?\w+\((.*)\)(?: ->|$| )", signatures, re.MULTILINE):
        if arguments == "*args, **kwargs":
            continue
        parts = re.sub(r"\[[^\]]*\]|<[^>]*>", "", arguments).split(", ") if arguments else []
        optional = sum("=" in part for part in parts)
        counts |= set(range(len(parts) - optional, len(parts) + 1))
    return counts


def differences(stand_in: ModuleType, library: dict[str, str]) -> Iterator[str]:
    """What a stand-in offers that the real library does not."""
    for name, value in names(stand_in):
        if name in OF_THE_STAND_IN:
            continue
        if name not in library:
            yield f"{name} does not exist"
        elif inspect.isfunction(value):
            count = len(inspect.signature(value).parameters)
            if (known := arities(library[name])) and count not in known:
                yield f"{name} takes {sorted(known)} arguments, not {count}"


def test_the_runtimes_stand_in_offers_what_tensorrt_has(
    tensorrt: dict[str, str], machine: Machine
) -> None:
    library = fake_gpu.tensorrt_runtime(machine, "tensorrt_rtx", "1.7")
    assert list(differences(library, tensorrt)) == []
    assert len(list(names(library))) > 30


def test_the_builders_stand_in_offers_what_tensorrt_has(
    tensorrt: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of version 11, whose names TensorRT-RTX has."""
    monkeypatch.setenv("FAKE_TENSORRT", "11.0.0")
    library = ModuleType("builder")
    path = FAKE_BUILDER / "tensorrt" / "__init__.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(library))
    assert list(differences(library, tensorrt)) == []


def test_the_drivers_stand_in_offers_what_cuda_bindings_have(
    bindings: dict[str, str], machine: Machine
) -> None:
    assert list(differences(fake_gpu.bindings_driver(machine), bindings)) == []


def test_a_name_or_an_arity_that_is_wrong_shows() -> None:
    """Else the comparisons would prove nothing."""
    library = ModuleType("library")

    class ICudaEngine:
        def get_tensor_name(self) -> str:
            return ""

        def get_tensor_nam(self, index: int) -> str:
            return ""

    library.ICudaEngine, library.Engine = ICudaEngine, ICudaEngine
    described = {
        "ICudaEngine": "",
        "ICudaEngine.get_tensor_name": "get_tensor_name(self: x.ICudaEngine, index: int) -> str",
    }
    assert list(differences(library, described)) == [
        "ICudaEngine.get_tensor_name takes [2] arguments, not 1",
        "ICudaEngine.get_tensor_nam does not exist",
        "Engine does not exist",
        "Engine.get_tensor_name does not exist",
        "Engine.get_tensor_nam does not exist",
    ]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def session(machine: Machine, tmp_path: Path) -> Iterator[Session]:
    """Engines for images of 1…2, prompts of 1…3 and points of 1…4."""
    plain = session_of(machine)
    folder = write(tmp_path / "a.medsa" / "engines" / "x", plain.manifest, describe())
    with Session(plain.manifest, TensorRTBackend(folder, plain.manifest, "tensorrt")) as session:
        yield session


@pytest.fixture
def run(session: Session) -> Any:
    """The decoder's run."""
    return session.backend._decoder


def reason(run: Any) -> str:
    """What the library's logger was told, once."""
    (line,) = run._logger.errors
    run._logger.errors.clear()
    return str(line)


def test_a_context_refuses_names_it_does_not_have(run: Any) -> None:
    assert not run._context.set_input_shape("points", (1, 2, 2))
    assert reason(run) == "no input points"
    assert not run._context.set_input_shape("low_res_masks", (1, 1, 8, 8))
    assert reason(run) == "no input low_res_masks"
    assert not run._context.set_tensor_address("points", ALIGNMENT)
    assert reason(run) == "no tensor points"


@pytest.mark.parametrize("shape", [(1, 5, 2), (4, 2, 2), (0, 2, 2), (1, 2, 3), (1, 2)])
def test_a_context_refuses_shapes_outside_the_profile(run: Any, shape: tuple[int, ...]) -> None:
    assert not run._context.set_input_shape("point_coords", shape)
    assert reason(run) == f"point_coords: {shape} is not in the optimization profile"
    values = {"point_coords": np.zeros((3, 4, 2), np.float32)}
    with run._gpu.current(), pytest.raises(errors.DeviceError, match="cannot have the shape"):
        run._enqueue(run._context, {name: shape for name in values}, {})


def test_a_context_refuses_to_run_without_shapes_and_addresses(run: Any) -> None:
    with run._gpu.current():
        context = run._new_context()
        with pytest.raises(errors.DeviceError, match=r"decoder.engine failed: no shape for has_"):
            run._execute(context)
        shapes = {name: tuple(shape) for name, shape in run.largest.items()}
        with pytest.raises(errors.DeviceError, match="no address for has_mask_input, image_emb"):
            run._enqueue(context, shapes, {})


@pytest.mark.parametrize(("offset", "size"), [(4, 1 << 10), (0, (1 << 10) - 1)])
def test_a_context_refuses_scratch_memory_that_is_unaligned_or_too_small(
    run: Any, offset: int, size: int
) -> None:
    strategy = run._library.ExecutionContextAllocationStrategy.USER_MANAGED
    with run._gpu.current():
        memory = run._gpu.allocate(1 << 12)
        context = run._engine.create_execution_context(strategy)
        context.set_device_memory(memory + offset, size)
        assert "cannot be scratch memory" in reason(run)
        with pytest.raises(errors.DeviceError, match="no scratch memory"):
            run._execute(context)


def test_a_context_refuses_values_of_another_type(session: Session, run: Any) -> None:
    """Which the real one reads as what they are not."""
    pixels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    embedding = session.encode(pixels)
    buffer = run._buffers["point_coords"]
    with run._gpu.current():
        run._gpu.upload(buffer.address, np.zeros(4, np.float16))
        shapes = {name: tuple(shape) for name, shape in run.largest.items()}
        addresses = {name: run._buffers[name].address for name in run._engine._tensors}
        with pytest.raises(errors.DeviceError, match="point_coords holds float16, expected float"):
            run._enqueue(run._context, shapes, addresses)
    assert session.segment(embedding, points=[(9, 9)]).masks.dtype == np.bool_


def test_engines_of_another_type_are_refused(machine: Machine, tmp_path: Path) -> None:
    plain = session_of(machine)
    folder = write(tmp_path / "a.medsa" / "engines" / "x", plain.manifest, describe())
    machine.functions["encoder"].dtypes = {"image": "HALF"}
    with pytest.raises(errors.BundleError, match=r"image is .*HALF"):
        TensorRTBackend(folder, plain.manifest, "tensorrt")
    assert machine.used == machine.pinned == 0
