"""Fixtures: bundles that were exported elsewhere, for tests where nothing can be exported.

The environment names their folder, MEDSA_DEVICE_BUNDLES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Maker = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle_of() -> Maker:
    """Golden case's name → its bundle."""
    return lambda name: Path(os.environ["MEDSA_DEVICE_BUNDLES"]) / f"{name}.medsa"


@pytest.fixture(scope="session")
def sam_bundle(bundle_of: Maker) -> Path:
    """A small bundle with SAM's outputs and conventions."""
    return bundle_of("sam")
