"""Name of a structure → the codes that a DICOM segmentation says of it, from a table of structures.

The table is `assets/structure_codes.csv`: SNOMED CT codes of the standard's own value sets (PS3.16
CID 7150 and 7151). Neither the order of words matters, nor articles, underscores and the plural.
`left` and `right` become a modifier. A lesion named after its organ, such as "liver tumour", has
the type of the lesion and the region of the organ.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

TABLE = "assets/structure_codes.csv"
IGNORED = frozenset({"a", "an", "and", "of", "the"})


@dataclass(frozen=True, kw_only=True)
class Code:
    """A coded concept.

    >>> Code(value="10200004", meaning="Liver").scheme
    'SCT'
    """

    value: str
    meaning: str
    scheme: str = "SCT"
    """The coding scheme's designator: SCT for SNOMED CT."""


TISSUE = Code(value="85756007", meaning="Tissue")
CATEGORIES = {
    "anatomical structure": Code(value="91723000", meaning="Anatomical Structure"),
    "tissue": TISSUE,
    "body substance": Code(value="91720002", meaning="Body Substance"),
    "abnormal structure": Code(value="49755003", meaning="Morphologically Abnormal Structure"),
    "physical object": Code(value="260787004", meaning="Physical object"),
}
"""The table's names of the categories → their codes (CID 7150)."""
SIDES = {
    "left": Code(value="7771000", meaning="Left"),
    "right": Code(value="24028007", meaning="Right"),
}


@dataclass(frozen=True, kw_only=True)
class StructureCodes:
    """What a segment is, in codes.

    >>> StructureCodes().type.meaning
    'Tissue'
    """

    category: Code = TISSUE
    type: Code = TISSUE
    modifier: Code | None = None
    """Of the type: the side."""
    region: Code | None = None
    """Where in the body it is."""
    region_modifier: Code | None = None


def structure_codes(name: str) -> StructureCodes | None:
    """The codes of a structure by its name; None for a name that the table does not know.

    >>> structure_codes("Kidney_Left").type.meaning, structure_codes("left kidney").modifier.meaning
    ('Kidney', 'Left')
    >>> tumour = structure_codes("liver tumours")
    >>> tumour.type.meaning, tumour.region.meaning
    ('Neoplasm', 'Liver')
    >>> structure_codes("thingamajig") is None
    True
    """
    words = _words(name)
    if codes := _look_up(words):
        return codes
    side = next((SIDES[word] for word in words if word in SIDES), None)
    plain = tuple(word for word in words if word not in SIDES)
    if side is not None and (codes := _look_up(plain)):
        return StructureCodes(category=codes.category, type=codes.type, modifier=side)
    return _lesion_of_an_organ(plain, side)


def _lesion_of_an_organ(words: tuple[str, ...], side: Code | None) -> StructureCodes | None:
    """The codes of an abnormal structure whose other words name an organ, at either end."""
    splits = [(words[i:], words[:i]) for i in range(1, len(words))]
    splits += [(words[:i], words[i:]) for i in range(1, len(words))]
    for lesion_words, organ_words in splits:
        lesion, organ = _look_up(lesion_words), _look_up(organ_words)
        if lesion and organ and lesion.category == CATEGORIES["abnormal structure"]:
            return StructureCodes(
                category=lesion.category,
                type=lesion.type,
                region=organ.type,
                region_modifier=side,
            )
    return None


def _look_up(words: tuple[str, ...]) -> StructureCodes | None:
    """The table's row for words in any order, each as it is or without its plural."""
    table = _table()
    singular = tuple(word[:-1] if word.endswith("s") else word for word in words)
    return table.get(tuple(sorted(words))) or table.get(tuple(sorted(singular)))


def _words(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case; digits are words of their own unless a letter leads."""
    return tuple(
        word for word in re.findall(r"[^\W\d_]+\d*|\d+", name.lower()) if word not in IGNORED
    )


@cache
def _table() -> dict[tuple[str, ...], StructureCodes]:
    """Sorted words of each name → its codes."""
    return {
        tuple(sorted(_words(name))): StructureCodes(
            category=CATEGORIES[row["category"]],
            type=Code(value=row["code"], meaning=row["meaning"]),
        )
        for row in table_rows()
        for name in row["names"].split("|")
    }


def table_rows() -> Iterator[dict[str, str]]:
    """The rows of the table: `names` (separated by |), `category`, `code`, `meaning`.

    >>> next(table_rows())["meaning"]
    'Liver'
    """
    text = (resources.files("medsa_deploy") / TABLE).read_text(encoding="utf-8")
    yield from csv.DictReader(text.splitlines())
