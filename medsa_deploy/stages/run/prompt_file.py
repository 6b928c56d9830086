"""A JSON file of prompts → the structures of a volume.

{"structures": [
  {"name": "liver", "points": [[120, 88, 40], [60, 90, 40, 0]]},
  {"name": "spleen", "boxes": [[30, 40, 38, 90, 110, 52]]}
]}

Coordinates are voxels x, y, z. A point's fourth number is its label: 1 foreground (default) or 0
background. A box is x0, y0, z0, x1, y1, z1; for one slice z1 is z0 + 1. If the network has several
classes, `class` instead of `name` selects one; without either, the structure gets all of them.
`colour` ("#dd8265") and `codes` ({"category": "91723000:Anatomical Structure", "type":
"10200004:Liver"}, as in `images/class_codes`) say how viewers show it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError, PromptError
from medsa_deploy.images.class_codes import SegmentStyle, style_of
from medsa_deploy.runtime.volumes.structures import Structure

KEYS = ("name", "class", "points", "boxes", "colour", "codes")
POINT = "a point in a volume should be x, y, z or x, y, z, label with label 1 or 0"
BOX = "a box in a volume should be x0, y0, z0, x1, y1, z1"
MOST = 1e9
"""The largest coordinate; comparing with it also excludes NaN and infinity."""
ROWS = {"points": POINT, "boxes": BOX}


def read_prompts(path: Path) -> list[Structure]:
    """The structures of a prompt file; PromptError names the entry that is wrong, and why."""
    return [parsed_structure(entry, place) for entry, place in _entries(path)]


def read_styles(path: Path) -> dict[str, SegmentStyle]:
    """Name or class of each structure of a prompt file that has a colour or codes → its style.

    >>> read_styles(Path("prompts.json"))
    {}
    """
    styles = {}
    for entry, place in _entries(path):
        if style := parsed_style(entry, place):
            styles[entry.get("name") or entry.get("class")] = style
    return styles


def parsed_style(entry: Any, place: str) -> SegmentStyle | None:
    """The style of a structure's entry, None without one; `place` names the entry in errors."""
    if not isinstance(entry, dict) or not {"colour", "codes"} & set(entry):
        return None
    codes = entry.get("codes", {})
    if not isinstance(codes, dict) or not (entry.get("name") or entry.get("class")):
        raise PromptError(f"{place}: a colour and codes (an object) belong to a name or a class")
    try:
        return style_of(codes | {"colour": entry.get("colour")}, place)
    except ImageError as e:
        raise PromptError(str(e)) from e


def _entries(path: Path) -> list[tuple[Any, str]]:
    """The entries of the structures of a prompt file, each with its place in errors."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise PromptError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise PromptError(f"{path} is not JSON: {e}") from e
    entries = data.get("structures") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or len(data) > 1:
        raise PromptError(f'{path} should be {{"structures": […]}} with at least one structure')
    return [(entry, f"{path}: structure {i}") for i, entry in enumerate(entries, 1)]


def structure_of(
    points: Sequence[tuple[float, ...]],
    boxes: Sequence[tuple[float, ...]],
    *,
    name: str | None = None,
    class_name: str | None = None,
) -> Structure:
    """A structure from rows of numbers: points of 3, or 4 with a label, and boxes of 6."""
    for row in points:
        if len(row) not in (3, 4) or row[3:] not in ((), (0,), (1,)):
            raise PromptError(f"{row_text(row)}: {POINT}")
    for row in boxes:
        if len(row) != 6:
            raise PromptError(f"{row_text(row)}: {BOX}")
    return Structure(
        points=tuple((row[0], row[1], row[2]) for row in points),
        labels=tuple(int(row[3]) if len(row) == 4 else 1 for row in points),
        boxes=tuple((row[0], row[1], row[2], row[3], row[4], row[5]) for row in boxes),
        name=name,
        class_name=class_name,
    )


def parsed_structure(entry: Any, place: str) -> Structure:
    """An entry of a prompt file as a structure; `place` names it in errors."""
    if not isinstance(entry, dict) or not set(entry) <= set(KEYS):
        raise PromptError(f"{place} should be an object with some of the keys {', '.join(KEYS)}")
    for key in ("name", "class"):
        text = entry.get(key)
        if text is not None and not (isinstance(text, str) and text.strip() and text.isprintable()):
            shown = reprlib.repr(text)
            raise PromptError(f"{place}: its {key} should be one line of text, found {shown}")
    rows = [_rows(entry.get(key, []), f"{place}: {shape}") for key, shape in ROWS.items()]
    if not any(rows):
        raise PromptError(f"{place} has no prompt: give it points or boxes")
    try:
        return structure_of(*rows, name=entry.get("name"), class_name=entry.get("class"))
    except PromptError as e:
        raise PromptError(f"{place}: {e}") from e


def _rows(value: Any, expected: str) -> list[tuple[float, ...]]:
    """A list of lists of finite numbers; otherwise PromptError, which says what was `expected`."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise PromptError(expected)
    for row in value:
        if not all(type(number) in (int, float) and abs(number) <= MOST for number in row):
            raise PromptError(f"{expected}, found {reprlib.repr(row)}")
    return [tuple(row) for row in value]


def row_text(row: tuple[float, ...]) -> str:
    """Numbers as an option has them: (5, 6) → `5,6`."""
    return ",".join(f"{number:g}" for number in row)
