"""Sessions on small bundles, and on a backend that notes what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import HEIGHT, WIDTH, FakeBackend

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.runtime import Session


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return seeded_image(WIDTH, 5)[:HEIGHT]


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with load(bundle, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_classes(bundle_of) -> Iterator[Session]:
    with load(bundle_of("medsa_2d_box_mask_two_classes"), threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def sam(sam_bundle: Path) -> Iterator[Session]:
    with load(sam_bundle, threads=2) as opened:
        yield opened


@pytest.fixture
def faked(bundle: Path) -> Callable[..., Session]:
    """Conventions → a session with them on a fake backend."""
    manifest = load_manifest(bundle)

    def make(*, values: dict[str, float] | None = None, **conventions: Any) -> Session:
        changed = replace(manifest, conventions=replace(manifest.conventions, **conventions))
        return Session(changed, FakeBackend(manifest.network, **(values or {})))

    return make


@pytest.fixture
def shown(faked) -> Callable[..., np.ndarray]:
    """Image and options → the grey levels 0…255 the network sees, for an image of its own size."""

    def see(image: Any, *, window: Any = None, **conventions: Any) -> np.ndarray:
        with faked(**conventions) as session:
            session.encode(image, intensity_window=window)
            return session.backend.images[0][0, 0] * 255

    return see
