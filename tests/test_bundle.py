"""Bundles appear whole or not at all, and replace nothing that is not a bundle."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from medsa_deploy.bundle import folder as folders
from medsa_deploy.bundle.folder import check_target, new_bundle
from medsa_deploy.bundle.manifest import MANIFEST_FILENAME
from medsa_deploy.errors import UsageError

MANIFEST = {"schema": 1, "files": []}


def write(folder: Path, name: str, content: object = MANIFEST) -> Path:
    """A bundle, as far as this module looks, whose only other file is called `name`."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_FILENAME).write_text(json.dumps(content))
    (folder / name).write_text(name)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.medsa"


@pytest.fixture
def earlier(target: Path) -> Path:
    return write(target, "earlier")


def test_a_bundle_takes_its_name_when_it_is_whole(target: Path) -> None:
    with new_bundle(target) as folder:
        assert folder.parent == target.parent  # renaming across file systems is not possible
        assert folder.name.startswith(".")
        write(folder, "new")
        assert not target.exists()
    assert names(target) == {"manifest.json", "new"}
    assert names(target.parent) == {"a.medsa"}


def test_an_earlier_bundle_stays_until_the_new_one_is_whole(target: Path, earlier: Path) -> None:
    with new_bundle(target) as folder:
        write(folder, "new")
        assert names(earlier) == {"manifest.json", "earlier"}
    assert names(target) == {"manifest.json", "new"}
    assert names(target.parent) == {"a.medsa"}


def test_a_bundle_is_as_readable_as_any_folder(target: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_bundle(target):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit, MemoryError])
@pytest.mark.parametrize("replaces", [True, False])
def test_what_ends_early_leaves_nothing(
    target: Path, error: type[BaseException], replaces: bool
) -> None:
    if replaces:
        write(target, "earlier")
    before = names(target.parent)

    def half() -> None:
        with new_bundle(target) as folder:
            write(folder, "half")
            (folder / "engines").mkdir()
            raise error

    with pytest.raises(error):
        half()
    assert names(target.parent) == before
    assert not replaces or names(target) == {"manifest.json", "earlier"}


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_between_the_two_renames_keeps_the_earlier_bundle(
    target: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Where the system cannot exchange two names in one step."""
    monkeypatch.setattr(folders, "exchange", lambda first, second: False)
    rename, calls = Path.rename, []

    def interrupted(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_bundle(target) as folder:
        write(folder, "new")
    assert names(target) == {"manifest.json", "earlier"}
    assert names(target.parent) == {"a.medsa"}


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def interrupted(folder: Path) -> None:
        mkdir(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "a.medsa"):
        raise AssertionError
    assert names(tmp_path) == set()


def test_an_earlier_bundle_that_cannot_be_put_back_is_not_deleted(
    target: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "exchange", lambda first, second: False)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self == target:
            return rename(self, to)
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="gone"), new_bundle(target) as folder:
        write(folder, "new")
    (aside,) = target.parent.iterdir()
    assert names(aside / "a.medsa") == {"manifest.json", "earlier"}


@pytest.mark.parametrize("force", [True, False])
def test_a_free_name_can_be_written(target: Path, force: bool) -> None:
    check_target(target, force=force)


@pytest.mark.parametrize("content", [MANIFEST, {"schema": 99, "files": [], "more": 1}])
def test_a_bundle_of_any_version_is_replaced_by_force_alone(target: Path, content: object) -> None:
    write(target, "earlier", content)
    with pytest.raises(UsageError, match=r"a\.medsa exists: replace it with --force, or name"):
        check_target(target, force=False)
    check_target(target, force=True)


def web_app(target: Path) -> None:
    """Another kind of manifest.json: what is in such a folder is not ours to delete."""
    write(target, "index.html", {"name": "app", "icons": []})


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        Path.touch,
        web_app,
        lambda target: write(target, "x", ["schema", "files"]),
        lambda target: write(target, "x", "schema files"),
        lambda target: (write(target, "x") / "manifest.json").write_bytes(b"\xff{"),
        lambda target: (target / "manifest.json").mkdir(parents=True),
        lambda target: target.symlink_to(target.parent / "nowhere"),
        lambda target: target.symlink_to(target),
    ],
    ids=["folder", "file", "web", "list", "text", "bytes", "nested", "dangling", "loop"],
)
def test_what_is_not_a_bundle_is_never_replaced(target: Path, make, force: bool) -> None:
    make(target)
    with pytest.raises(UsageError, match=r"a\.medsa exists and is not a bundle: delete it, or"):
        check_target(target, force=force)
    assert os.path.lexists(target)


def test_a_link_to_a_bundle_is_replaced_and_what_it_points_to_kept(target: Path) -> None:
    real = write(target.parent / "real.medsa", "earlier")
    target.symlink_to("real.medsa")
    check_target(target, force=True)
    with new_bundle(target) as folder:
        write(folder, "new")
    assert not target.is_symlink()
    assert names(target) == {"manifest.json", "new"}
    assert names(real) == {"manifest.json", "earlier"}


@pytest.mark.parametrize("parent", ["none", "file"])
def test_a_parent_that_is_no_folder_is_refused(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / parent / "a.medsa"
    with pytest.raises(UsageError, match=f"{parent} is not a folder: make it, or name another"):
        check_target(target, force=True)
    with (
        pytest.raises(UsageError, match=r"a\.medsa cannot be written .*name another output"),
        new_bundle(target),
    ):
        pytest.fail("the block must not run")


def test_a_parent_that_cannot_be_written_is_refused(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write all
    with pytest.raises(UsageError, match="cannot be written to: name another output with -o"):
        check_target(target, force=True)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="cannot be written"),
        new_bundle(tmp_path / ("x" * 300)),
    ):
        pytest.fail("the block must not run")


def test_a_target_is_written_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_target(Path("a.medsa"), force=False)
    with new_bundle(Path("a.medsa")) as folder:
        write(folder, "new")
    assert names(tmp_path / "a.medsa") == {"manifest.json", "new"}
    shutil.rmtree("a.medsa")
