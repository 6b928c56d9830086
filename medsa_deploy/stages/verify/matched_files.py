"""Label files and the files they belong to → pairs, matched by name.

A name is what is left of `case7_label.nii.gz` without suffixes and the endings that tools add:
`case7`; `run` writes `case7.png.mask.png` for `case7.png`.
"""

from __future__ import annotations

from pathlib import Path

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import find_images
from medsa_deploy.images.files import suffix
from medsa_deploy.images.read import SUFFIXES

ENDINGS = ("_labels", "_label", "_mask", "_segmentation", "_seg", "_gt", "_0000", ".mask")
"""What follows the name of a case; _0000 is nnU-Net's first channel."""


def pair_files(labels: Path, others: Path, what: str) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """(label file, `what`) pairs in the order of the names, and others without a label file.

    Two files are a pair whatever their names, and so is a file with the folder of a DICOM series.
    In two folders every label file needs its counterpart: ImageError lists those without.
    """
    for path in (labels, others):
        if not path.exists():
            raise ImageError(f"{path} does not exist: give a file or a folder")
    if not labels.is_dir():
        if others.is_dir() and what == "segmentation":
            raise UsageError(f"{labels} is a file and {others} a folder: give two of a kind")
        return [(labels, others)], []
    if not others.is_dir():
        raise UsageError(f"{labels} is a folder and {others} a file: give two of a kind")
    if labels.resolve() == others.resolve():
        raise UsageError(f"{labels} holds both: put labels into a folder of their own")
    folders = [] if what == "segmentation" else [p for p in others.iterdir() if p.is_dir()]
    labelled = _by_name(find_images(labels))
    found = _by_name([*_files(others, folders), *folders])
    alone = sorted(labelled.keys() - found.keys())
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise ImageError(
            f"{others} holds no {what} for {', '.join(labelled[n].name for n in alone[:3])}{more}: "
            "files are matched by name without suffix"
        )
    pairs = [(path, found[name]) for name, path in sorted(labelled.items())]
    unlabelled = [p for n, p in sorted(found.items()) if n not in labelled and p.is_file()]
    return pairs, unlabelled


def _files(folder: Path, folders: list[Path]) -> list[Path]:
    """The images in a folder; there need be none where it holds folders of series."""
    try:
        return find_images(folder)
    except ImageError:
        if not folders:
            raise
        return []


def _by_name(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = _name(path)
        if name in found:
            raise ImageError(
                f"{path.parent}: {found[name].name} and {path.name} both stand for '{name}': "
                "keep one of them"
            )
        found[name] = path
    return found


def _name(path: Path) -> str:
    """A file name without known suffixes and endings, however many there are."""
    name, before = path.name, ""
    while name != before:
        before = name
        known = suffix(Path(name))
        for ending in (known if known in SUFFIXES else "", *ENDINGS):
            if ending and name.lower().endswith(ending) and len(name) > len(ending):
                name = name[: -len(ending)]
                break
    return name
