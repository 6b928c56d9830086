"""Programs of the C++ runtime, compiled once a run of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cpp_driver import SANITIZERS, Driver, compile_program

SOURCE = Path(__file__).with_name("driver.cpp")


@pytest.fixture(scope="session")
def sanitized_program(shared_folder: Path) -> Path:
    """The driver with address and undefined-behaviour sanitizers."""
    return compile_program(SOURCE, shared_folder / "cpp-driver-sanitized", *SANITIZERS)


@pytest.fixture(scope="session")
def fast_program(shared_folder: Path) -> Path:
    """The driver as hosts compile it."""
    return compile_program(SOURCE, shared_folder / "cpp-driver", "-O3")


@pytest.fixture(scope="module")
def driver(sanitized_program: Path) -> Iterator[Driver]:
    """A driver with sanitizers, for all tests of a module."""
    with Driver(sanitized_program) as running:
        yield running
