"""Fixtures: golden checkpoints and the bundles that are exported from them, each once a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import call
from filelock import FileLock
from golden_cases import GoldenCase, export_options
from torch.onnx._internal.exporter._registration import ONNXRegistry

from medsa_deploy import stages
from medsa_deploy.exporters.architecture import Overrides

Maker = Callable[[str], Path]

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core
    torch.set_num_threads(1)

# Every export builds torch's table of translations anew, in a sixth of its time; it never changes.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def checkpoint_of(shared_folder: Path) -> Maker:
    """Golden case's name → its checkpoint, as the public code's training would save it."""
    folder = shared_folder / "checkpoints"
    folder.mkdir(exist_ok=True)

    def make(name: str) -> Path:
        path = folder / f"{name}.pth"
        with FileLock(folder / f"{name}.lock"):
            if path.exists():
                return path
            case = GoldenCase(name)
            state = {k: torch.from_numpy(v) for k, v in case.state_dict.items()}
            medsa = {
                "epoch": 3,
                "model": "sam",
                "state_dict": state,
                "optimizer": {},
                "best_tol": 0.1,
                "path_helper": {"prefix": "logs"},
            }
            files = {"model": {"model": state}, "bare": state}
            if case.base is not None:
                base = {k: torch.from_numpy(v) for k, v in case.base.items()}
                torch.save(base, folder / f"{name}-base.pth")
            torch.save(files.get(case.settings.get("container"), medsa), path)
        return path

    return make


@pytest.fixture(scope="session")
def bundle_of(shared_folder: Path, checkpoint_of: Maker) -> Maker:
    """Golden case's name → its bundle, exported once by the command line.

    Tests must not change it: copy it first.
    """
    folder = shared_folder / "bundles"
    folder.mkdir(exist_ok=True)

    def make(name: str) -> Path:
        exported = os.environ.get("MEDSA_TEST_BUNDLE")  # of `make gpu-check`, which has one
        if exported and name == "medsa_2d":
            return Path(exported)
        path = folder / f"{name}.medsa"
        with FileLock(folder / f"{name}.lock"):
            if path.exists():
                return path
            options = [f"--{k.replace('_', '-')}={v}" for k, v in export_options(name).items()]
            checkpoint = checkpoint_of(name)
            if GoldenCase(name).base is not None:
                options.append(f"--base={checkpoint.with_name(f'{name}-base.pth')}")
            done = call("export", checkpoint, "-o", path, *options, "--json")
            assert done.code == 0, done.err
        return path

    return make


@pytest.fixture(scope="session")
def sam_bundle(shared_folder: Path) -> Path:
    """A small bundle in Meta's form, with SAM's outputs and conventions (clicks are xy)."""
    folder = shared_folder / "sam"
    with FileLock(shared_folder / "sam.lock"):
        if not (folder / "sam.medsa").exists():
            folder.mkdir()
            _export_sam(folder)
    return folder / "sam.medsa"


def _export_sam(folder: Path) -> None:
    """Golden case medsa_hyp_2d without its adapters."""
    tensors = GoldenCase("medsa_hyp_2d").state_dict.items()
    state = {k: torch.from_numpy(v) for k, v in tensors if "_Adapter." not in k}
    torch.save(state, folder / "sam.pth")
    stages.export_checkpoint(
        folder / "sam.pth",
        output=None,
        base=None,
        images=None,
        overrides=Overrides(),
        force=False,
    )
