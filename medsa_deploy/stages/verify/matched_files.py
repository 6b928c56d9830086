"""Label files and the files they belong to → pairs, matched by name.

The name of `case7_label.nii.gz` is `case7`, without suffixes and the endings that tools add. `run`
writes `case7.png.mask.png` for `case7.png`.
"""

from __future__ import annotations

from pathlib import Path

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import find_images
from medsa_deploy.images.files import suffix
from medsa_deploy.images.signatures import SUFFIXES

ENDINGS = ("_labels", "_label", "_mask", "_segmentation", "_seg", "_gt", "_0000", ".mask")
"""Endings after the name of a case; _0000 is nnU-Net's first channel."""


def pair_files(labels: Path, folder: Path, kind: str) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """(label file, `kind`) pairs in the order of their names, and files without a label file.

    Two files are a pair regardless of their names; so are a file and the folder of a DICOM series.
    In two folders every label file needs a counterpart: ImageError lists label files without one.
    """
    for path in (labels, folder):
        if not path.exists():
            raise ImageError(f"{path} does not exist: give a file or a folder")
    if not labels.is_dir():
        if folder.is_dir() and kind == "segmentation":
            raise UsageError(f"{labels} is a file and {folder} a folder: give two of a kind")
        return [(labels, folder)], []
    if not folder.is_dir():
        raise UsageError(f"{labels} is a folder and {folder} a file: give two of a kind")
    if labels.resolve() == folder.resolve():
        raise UsageError(f"{labels} holds both: put labels into a folder of their own")
    folders = [] if kind == "segmentation" else [p for p in folder.iterdir() if p.is_dir()]
    label_files = _by_name(find_images(labels))
    counterparts = _by_name([*_files(folder, folders), *folders])
    alone = sorted(label_files.keys() - counterparts.keys())
    if alone:
        names = ", ".join(label_files[name].name for name in alone[:3])
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise ImageError(
            f"{folder} holds no {kind} for {names}{more}: files are matched by name without suffix"
        )
    pairs = [(path, counterparts[name]) for name, path in sorted(label_files.items())]
    without = sorted(counterparts.keys() - label_files.keys())
    return pairs, [counterparts[name] for name in without if counterparts[name].is_file()]


def _files(folder: Path, folders: list[Path]) -> list[Path]:
    """The images in a folder; may be empty if the folder has folders of series."""
    try:
        return find_images(folder)
    except ImageError:
        if not folders:
            raise
        return []


def _by_name(paths: list[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        name = _name(path)
        if name in files:
            raise ImageError(
                f"{path.parent}: {files[name].name} and {path.name} both stand for '{name}': "
                "keep one of them"
            )
        files[name] = path
    return files


def _name(path: Path) -> str:
    """A file name without any known suffixes and endings."""
    name, before = path.name, ""
    while name != before:
        before = name
        known = suffix(Path(name))
        for ending in (known if known in SUFFIXES else "", *ENDINGS):
            if ending and name.lower().endswith(ending) and len(name) > len(ending):
                name = name[: -len(ending)]
                break
    return name
