"""Segments of a label map → tables beside its file: ITK-SNAP's label descriptions, and JSON.

`seg.nii.gz` gets `seg.labels.txt`, which ITK-SNAP opens as label descriptions, and
`seg.labels.json` for programs: NIfTI itself has no place for names, colours and codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .files import suffix
from .segments import Segment

SNAP_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
"""


def table_paths(path: Path) -> tuple[Path, Path]:
    """The tables beside a NIfTI: ITK-SNAP's, and JSON.

    >>> [path.name for path in table_paths(Path("seg.nii.gz"))]
    ['seg.labels.txt', 'seg.labels.json']
    """
    stem = path.name[: -len(suffix(path))]
    return path.with_name(f"{stem}.labels.txt"), path.with_name(f"{stem}.labels.json")


def snap_table(segments: Sequence[Segment]) -> str:
    """The text of ITK-SNAP's label descriptions."""
    rows = []
    for segment in segments:
        red, green, blue = segment.colour
        name = segment.name.replace('"', "'")
        rows.append(
            f'{segment.label:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{name}"\n'
        )
    return SNAP_HEADER + "".join(rows)


def json_table(segments: Sequence[Segment]) -> str:
    """The same with codes: `{"labels": [{"label": 1, "name": …, "colour": …, "codes": …}]}`."""
    return json.dumps({"labels": [asdict(segment) for segment in segments]}, indent=2) + "\n"
