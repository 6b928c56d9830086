"""The C++ runtime of this package → a folder with its headers, a CMake project and examples."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from medsa_deploy import __version__
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.errors import UsageError

SOURCES = "cpp"
"""The folder in this package."""
VERSION_FILE = "VERSION"


@dataclass(frozen=True, kw_only=True)
class CppProject:
    """A copy of the C++ runtime."""

    folder: Path
    version: str
    """Of the medsa-deploy that it came with."""
    files: tuple[str, ...]
    """Relative to the folder, with `/`."""


def copy_cpp(output: Path, *, force: bool = False) -> CppProject:
    """Copy headers, CMake project and examples to a new folder, whole or not at all.

    UsageError if `output` exists and is not empty, unless `force` replaces an earlier copy, or if
    it cannot be written.

    >>> copy_cpp(Path("medsa")).files[:2]
    ('CMakeLists.txt', 'VERSION')
    """
    _check_output(output, force=force)
    try:
        with (
            resources.as_file(resources.files("medsa_deploy") / SOURCES) as sources,
            new_bundle(output) as folder,
        ):
            without_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(sources, folder, ignore=without_caches, dirs_exist_ok=True)
            (folder / VERSION_FILE).write_text(f"{__version__}\n", encoding="utf-8")
    except OSError as e:
        raise UsageError(
            f"{output} cannot be written ({e.strerror}): name another folder with -o"
        ) from e
    files = sorted(path for path in output.rglob("*") if path.is_file())
    names = tuple(path.relative_to(output).as_posix() for path in files)
    return CppProject(folder=output, version=__version__, files=names)


def _check_output(output: Path, *, force: bool) -> None:
    """UsageError unless a folder can be put at `output`; only an earlier copy is replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "include" / "medsa.hpp").is_file() or not (output / VERSION_FILE).is_file():
        raise UsageError(
            f"{output} exists and is no copy of the C++ runtime: name another folder with -o"
        )
    if not force:
        raise UsageError(
            f"{output} exists: replace it with --force, which also removes your files in it, or "
            "name another folder with -o"
        )
