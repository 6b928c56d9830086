"""Fixtures that several test modules share, and what is left out of a run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from medsa_deploy.nvidia import cuda

if "MEDSA_DEVICE_BUNDLES" in os.environ:  # an interpreter without torch, as on a device
    from device_bundles import bundle_of, sam_bundle
else:
    from exported_bundles import bundle_of, checkpoint_of, sam_bundle

    # pytest gives handlers to loggers that do not propagate: torch would then record each step of
    # an export, and a failing test would show thousands of such lines.
    logging.getLogger("torch.__trace").propagate = True
    __all__ = ["bundle_of", "checkpoint_of", "sam_bundle"]

# The first example pays for caches and imports, and the machines are shared.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# A script's background jobs ignore Ctrl-C, and so would the commands that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none; `make gpu-check` runs or rehearses it."""
    if cuda.device() is None and "MEDSA_REHEARSAL" not in os.environ:
        out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_of: Callable[[str], Path]) -> Path:
    """A small Med-SA bundle: 256×256, one class, trained by the public code (clicks are yx)."""
    return bundle_of("medsa_2d")


@pytest.fixture(scope="session")
def bundle_3d(bundle_of: Callable[[str], Path]) -> Path:
    """A small 3D bundle with HyP-Adpt: 256×256, chunks of 4 slices, two classes (clicks are yx)."""
    return bundle_of("medsa_hyp_3d")
