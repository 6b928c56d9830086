"""A file is written whole or not at all, whatever fails and whenever an interrupt arrives."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.bundle import atomic
from medsa_deploy.bundle.atomic import INNER_SUFFIXES, whole_file, write_bytes, write_text
from medsa_deploy.errors import ImageError
from medsa_deploy.images.files import output_file

NAMES = st.sampled_from(
    [
        "mask.png",
        "mask.nii.gz",
        "MASK.NII.GZ",
        "logits.npy",
        "1.2.840.10008.dcm",
        "plain",
        ".hidden",
    ]
)
EARLIER = st.none() | st.binary(max_size=20)
"""Content of an earlier file at the target, if there is one."""
CHUNKS = st.lists(st.binary(min_size=1, max_size=20), max_size=5)
ERRORS = st.sampled_from([OSError, KeyboardInterrupt, SystemExit, MemoryError, ValueError])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("atomic")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def target(folder: Path, name: str, earlier: bytes | None) -> Path:
    """A path in a folder of its own, below `folder`, that holds nothing but an earlier file."""
    path = Path(tempfile.mkdtemp(dir=folder)) / name
    if earlier is not None:
        path.write_bytes(earlier)
    return path


def write_chunks(path: Path, chunks: list[bytes]) -> None:
    with path.open("wb") as f:
        for chunk in chunks:
            f.write(chunk)


@given(name=NAMES, earlier=EARLIER, chunks=CHUNKS)
def test_a_written_file_is_whole_and_alone(
    folder: Path, name: str, earlier: bytes | None, chunks: list[bytes]
) -> None:
    path, data = target(folder, name, earlier), b"".join(chunks)
    before = contents(path.parent)
    with whole_file(path) as temporary:
        write_chunks(temporary, chunks)
        assert contents(path.parent) == {**before, temporary.name: data}
    assert contents(path.parent) == {name: data}
    write_bytes(path, data[::-1])
    assert contents(path.parent) == {name: data[::-1]}


@given(name=NAMES)
def test_the_temporary_file_is_hidden_beside_its_target_and_has_its_suffix(
    folder: Path, name: str
) -> None:
    path = target(folder, name, None)
    with whole_file(path) as temporary, whole_file(path) as another:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        outer, ending = path.suffixes[-2:-1], path.suffix.lower()
        inner = outer[0].lower() if outer and outer[0].lower() in INNER_SUFFIXES else ""
        expected = f"{inner}{ending}"
        assert temporary.name.endswith(expected)
        assert temporary.name.count(".") == 1 + expected.count(".")
        assert temporary != another
        temporary.touch()
        another.touch()


def test_a_library_that_goes_by_the_suffix_compresses(tmp_path: Path) -> None:
    with whole_file(tmp_path / "mask.nii.gz") as temporary:
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), temporary)
    assert (tmp_path / "mask.nii.gz").read_bytes().startswith(b"\x1f\x8b")
    assert nibabel.load(tmp_path / "mask.nii.gz").shape == (4, 4, 4)


@given(text=st.text(st.characters(codec="utf-8"), max_size=50))
def test_text_is_utf_8_with_the_line_ends_it_has(folder: Path, text: str) -> None:
    path = target(folder, "report.html", None)
    write_text(path, text)
    assert contents(path.parent) == {"report.html": text.encode()}


@given(text=st.just("half \ud800"), earlier=EARLIER)
def test_text_that_is_not_unicode_changes_nothing(
    folder: Path, text: str, earlier: bytes | None
) -> None:
    path = target(folder, "report.html", earlier)
    before = contents(path.parent)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, text)
    assert contents(path.parent) == before


@given(name=NAMES, earlier=EARLIER, chunks=CHUNKS, error=ERRORS, started=st.booleans())
def test_a_block_that_fails_leaves_what_was_there(
    folder: Path,
    name: str,
    earlier: bytes | None,
    chunks: list[bytes],
    error: type[BaseException],
    started: bool,
) -> None:
    path = target(folder, name, earlier)
    before = contents(path.parent)

    def half() -> None:
        with whole_file(path) as temporary:
            if started:
                write_chunks(temporary, chunks)
            raise error

    with pytest.raises(error):
        half()
    assert contents(path.parent) == before


@given(name=NAMES, earlier=EARLIER, error=ERRORS)
def test_a_rename_that_fails_leaves_what_was_there(
    folder: Path, name: str, earlier: bytes | None, error: type[BaseException]
) -> None:
    path = target(folder, name, earlier)
    before = contents(path.parent)

    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(error):
            write_bytes(path, b"new")
    assert contents(path.parent) == before


@given(name=NAMES, earlier=EARLIER)
def test_a_block_that_writes_nothing_is_an_error(
    folder: Path, name: str, earlier: bytes | None
) -> None:
    path = target(folder, name, earlier)
    before = contents(path.parent)
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert contents(path.parent) == before


def interrupt_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` with an interrupt before line `step` that runs in the module; whether it came."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != atomic.__file__:
            return None
        lines += event == "line"
        if event == "line" and lines == step:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_an_interrupt_before_any_line_leaves_the_earlier_or_the_new_file(
    tmp_path: Path, earlier: bytes | None
) -> None:
    step = 1
    while True:
        path = target(tmp_path, "mask.nii.gz", earlier)
        before = contents(path.parent)
        came = interrupt_at(step, lambda path=path: write_bytes(path, b"new"))
        after = {path.name: b"new"}
        assert contents(path.parent) in ([before, after] if came else [after])
        if not came:
            break
        step += 1
    assert step > 5, "the interrupt was never inside the write"


@given(name=NAMES, earlier=EARLIER, chunks=CHUNKS, error=ERRORS)
def test_an_image_writer_names_the_file_it_could_not_write(
    folder: Path, name: str, earlier: bytes | None, chunks: list[bytes], error: type[BaseException]
) -> None:
    path = target(folder, name, earlier)
    before = contents(path.parent)

    def half() -> None:
        with output_file(path) as temporary:
            write_chunks(temporary, chunks)
            raise error

    with pytest.raises(ImageError if error is OSError else error) as failure:
        half()
    assert error is not OSError or str(failure.value).startswith(f"{path} cannot be written")
    assert contents(path.parent) == before
