"""A server's environment, repositories and servers for the tests of `triton` and `remote`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from triton_server import TritonServer, make_environment

from medsa_deploy.triton.models import RepositoryOptions
from medsa_deploy.triton.repository import write_repository


@pytest.fixture(scope="session")
def triton_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages that hold tritonserver; half a minute and 500 MB."""
    return make_environment(tmp_path_factory.mktemp("tritonserver") / "environment")


@pytest.fixture(scope="session")
def liver(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the 2D bundle under the name `liver`."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("bundles") / "liver.medsa"))


@pytest.fixture(scope="module")
def serving(
    triton_packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., TritonServer]]:
    """Bundles and options → a server that runs until the module's tests are done."""
    with ExitStack() as opened:

        def start(*bundles: Path, **options: object) -> TritonServer:
            folder = tmp_path_factory.mktemp("served")
            write_repository(bundles, folder / "models", RepositoryOptions(**options))
            server = TritonServer(triton_packages, folder / "models", folder / "log")
            return opened.enter_context(server)

        yield start


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Six (240, 320) uint8 images of one bright box each, in noise."""
    rng = np.random.default_rng(19)
    planes = rng.integers(0, 60, (6, 240, 320), np.uint8)
    for i, plane in enumerate(planes):
        plane[40 + 10 * i : 150, 60 : 200 + 15 * i] += 120
    return list(planes)
