"""A session of engines on a GPU in host memory (fake_gpu).

What runs here is the package's own code; what stands in is pycuda, cuda-bindings and TensorRT.
"""

from __future__ import annotations

from pathlib import Path

import fake_gpu
import pytest
from device_sessions import open_engines
from fake_engines import describe, session_of, write
from fake_gpu import Machine

from medsa_deploy.runtime import Session


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def plain(machine: Machine) -> Session:
    """The network without a GPU."""
    return session_of(machine)


@pytest.fixture
def folder(plain: Session, tmp_path: Path) -> Path:
    return write(tmp_path / "a.medsa" / "engines" / "x", plain.manifest, describe())


@pytest.fixture
def session(plain: Session, folder: Path) -> Session:
    return open_engines(plain, folder)
