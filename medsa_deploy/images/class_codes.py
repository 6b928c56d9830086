"""A file with the codes and colours of classes (CSV, or dcmqi's JSON) → styles of segments.

A style overrides what `structure_codes` and `label_colours` say of a structure. CSV has a header
with `name` and any of `category`, `type`, `modifier`, `region`, `region_modifier` and `colour`. A
code is `VALUE:MEANING`, or `SCHEME:VALUE:MEANING` for another scheme than SNOMED CT. A colour is
`#rrggbb`. The JSON is the metadata of dcmqi's itkimage2segimage, with `segmentAttributes`.
"""

from __future__ import annotations

import csv
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError

from .label_colours import Rgb
from .structure_codes import Code, StructureCodes

CODE_COLUMNS = ("category", "type", "modifier", "region", "region_modifier")
SEQUENCES = {
    "category": "SegmentedPropertyCategoryCodeSequence",
    "type": "SegmentedPropertyTypeCodeSequence",
    "modifier": "SegmentedPropertyTypeModifierCodeSequence",
    "region": "AnatomicRegionSequence",
    "region_modifier": "AnatomicRegionModifierSequence",
}
"""Field of `StructureCodes` → its attribute in dcmqi's JSON."""
NAMES = ("SegmentLabel", "SegmentDescription", "TrackingIdentifier")
"""Where dcmqi's JSON has the name of a class, the most telling first."""
VALUE_LENGTH, SCHEME_LENGTH, MEANING_LENGTH = 16, 16, 64
"""DICOM's limits, in characters."""


@dataclass(frozen=True, kw_only=True)
class SegmentStyle:
    """What a user says of a structure; None for what the tables say."""

    codes: StructureCodes | None = None
    colour: Rgb | None = None


def read_class_codes(path: Path) -> dict[str, SegmentStyle]:
    """Name of each class in a file → its style; ImageError says which entry is wrong, and how.

    >>> read_class_codes(Path("codes.csv"))["liver"].colour
    (221, 130, 101)
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        raise ImageError(f"{path} cannot be read as codes of classes: {e}") from e
    if not text.lstrip().startswith("{"):
        return _csv_styles(path, text)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{path} is not JSON: {e}") from e
    return _dcmqi_styles(path, data)


def parse_colour(text: str, place: str) -> Rgb:
    """`#dd8265` → (221, 130, 101); ImageError, which starts with `place`, for anything else.

    >>> parse_colour("#dd8265", "--colors")
    (221, 130, 101)
    """
    if not re.fullmatch(r"#?[0-9a-fA-F]{6}", text.strip()):
        raise ImageError(f"{place}: {reprlib.repr(text)} is not a colour, expected #rrggbb")
    red, green, blue = bytes.fromhex(text.strip().removeprefix("#"))
    return red, green, blue


def style_of(data: Mapping[str, Any], place: str) -> SegmentStyle:
    """A style from an object of JSON with the columns of the CSV; `place` starts errors.

    >>> style_of({"type": "10200004:Liver", "colour": "#dd8265"}, "prompts.json").codes.type.value
    '10200004'
    """
    texts = {name: data.get(name) or "" for name in (*CODE_COLUMNS, "colour")}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ImageError(f"{place}: its {wrong[0]} is no text: write SCHEME:VALUE:MEANING")
    codes = {
        name: _code(texts[name], f"{place}: its {name}") for name in CODE_COLUMNS if texts[name]
    }
    return SegmentStyle(
        codes=_codes(codes, place) if codes else None,
        colour=parse_colour(texts["colour"], place) if texts["colour"] else None,
    )


def _csv_styles(path: Path, text: str) -> dict[str, SegmentStyle]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = set(reader.fieldnames or ())
    if "name" not in columns or not columns <= {"name", "colour", *CODE_COLUMNS}:
        raise ImageError(
            f"{path} has the columns {', '.join(sorted(map(str, columns))) or 'none'}; expected "
            f"name and some of {', '.join((*CODE_COLUMNS, 'colour'))}"
        )
    styles = {}
    for number, row in enumerate(reader, 2):
        place = f"{path}: line {number}"
        if not row.get("name") or None in row:
            raise ImageError(f"{place} has no name, or more values than there are columns")
        styles[row["name"].strip()] = style_of(row, place)
    return styles


def _dcmqi_styles(path: Path, data: Any) -> dict[str, SegmentStyle]:
    groups = data.get("segmentAttributes") if isinstance(data, dict) else None
    if not isinstance(groups, list):
        raise ImageError(f"{path} has no list `segmentAttributes`, expected dcmqi's metadata")
    segments = [s for group in groups for s in (group if isinstance(group, list) else [group])]
    styles = {}
    for number, segment in enumerate(segments, 1):
        place = f"{path}: segment {number}"
        if not isinstance(segment, dict):
            raise ImageError(f"{place} is {reprlib.repr(segment)}, expected an object")
        name = next((segment[key] for key in NAMES if isinstance(segment.get(key), str)), None)
        if not name:
            raise ImageError(f"{place} has no name: give it a SegmentLabel")
        codes = {
            field: _dcmqi_code(segment[key], f"{place}: its {key}")
            for field, key in SEQUENCES.items()
            if segment.get(key)
        }
        colour = segment.get("recommendedDisplayRGBValue")
        styles[name] = SegmentStyle(
            codes=_codes(codes, place) if codes else None,
            colour=None if colour is None else _rgb(colour, place),
        )
    return styles


def _codes(codes: Mapping[str, Code], place: str) -> StructureCodes:
    """Codes of a structure; a category and a type belong together."""
    if ("category" in codes) != ("type" in codes):
        raise ImageError(f"{place} has a category without a type, or the reverse: give both")
    return StructureCodes(**codes)


def _code(text: str, place: str) -> Code:
    """`VALUE:MEANING` or `SCHEME:VALUE:MEANING`."""
    parts = [part.strip() for part in text.split(":", 2)]
    if len(parts) == 2:
        parts = ["SCT", *parts]
    if len(parts) != 3:
        raise ImageError(
            f"{place} is {reprlib.repr(text)}, expected VALUE:MEANING or SCHEME:VALUE:MEANING"
        )
    return _checked_code(*parts, place=place)


def _dcmqi_code(data: Any, place: str) -> Code:
    """`{"CodeValue": …, "CodingSchemeDesignator": …, "CodeMeaning": …}`, also in a list."""
    item = data[0] if isinstance(data, list) and data else data
    keys = ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
        raise ImageError(f"{place} should be an object with {', '.join(keys)}")
    return _checked_code(*(item[key] for key in keys), place=place)


def _checked_code(scheme: str, value: str, meaning: str, *, place: str) -> Code:
    lengths = ((scheme, SCHEME_LENGTH), (value, VALUE_LENGTH), (meaning, MEANING_LENGTH))
    for text, longest in lengths:
        if not (0 < len(text) <= longest and text.isprintable() and "\\" not in text):
            raise ImageError(
                f"{place} holds {reprlib.repr(text)}, expected 1 to {longest} characters without "
                "backslashes"
            )
    return Code(scheme=scheme, value=value, meaning=meaning)


def _rgb(value: Any, place: str) -> Rgb:
    """Three whole numbers 0…255."""
    if not isinstance(value, list) or [type(v) for v in value] != [int] * 3:
        shown = reprlib.repr(value)
        raise ImageError(f"{place}: its colour is {shown}, expected three numbers 0…255")
    red, green, blue = value
    if not all(0 <= v <= 255 for v in value):
        shown = reprlib.repr(value)
        raise ImageError(f"{place}: its colour is {shown}, expected three numbers 0…255")
    return red, green, blue
