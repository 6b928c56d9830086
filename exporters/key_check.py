"""A checkpoint's shapes and a table of keys → shapes from which a network can be built.

All sizes of a network are read from the keys in its family's tables, so these keys are checked
first: a network built from a wrong one would crash or, worse, agree with itself. A table gives each
key's expected shape. `#` in a key stands for every index there is. In a shape a number is itself, a
name is the same size wherever it stands, and `*` is any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from medsa_deploy.errors import CheckpointError

from .shapes import Shapes


def checked(shapes: Shapes, *, required: Mapping[str, str], optional: Mapping[str, str]) -> Shapes:
    """`shapes`, fit to build a network from; CheckpointError lists what is missing or wrong.

    A key that one block lacks and another has is borrowed from that one: the network can then be
    built, and everything the checkpoint lacks be listed.
    """
    borrowed: dict[str, tuple[int, ...]] = {}
    missing: list[str] = []
    for pattern in required:
        keys = list(_keys(pattern, shapes))
        present = [shapes[key] for key in keys if key in shapes]
        absent = [key for key in keys if key not in shapes]
        borrowed |= {key: present[0] for key in absent if present}
        missing += [] if present else absent
    counterparts = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
    halves = [key.rpartition(".") for key in shapes if key.endswith(tuple(counterparts))]
    missing += [
        k for block, _, table in halves if (k := f"{block}.{counterparts[table]}") not in shapes
    ]
    if problems := misfit(
        shapes, missing=missing, wrong=list(_wrong({**required, **optional}, shapes))
    ):
        raise CheckpointError(f"the checkpoint is not a network known here. {problems}")
    return Shapes(dict(shapes) | borrowed)


def misfit(
    shapes: Shapes,
    *,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> str:
    """What does not fit, in one line; empty if nothing."""
    groups = {"missing keys": missing, "unknown keys": unknown, "wrong shapes": wrong}
    text = "; ".join(f"{title}: {listed(names)}" for title, names in groups.items() if names)
    if missing and any("_Adapter." in key for key in shapes):
        text += ". An adapter-only file needs --base FILE, the SAM checkpoint it was trained on"
    return text


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names, with those that differ only by a block's number written once."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    parts = [
        keys[0] if len(keys) == 1 else f"{merged} ({len(keys)}×)"
        for merged, keys in by_pattern.items()
    ]
    more = f" and {len(parts) - limit} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more


def _wrong(table: Mapping[str, str], shapes: Shapes) -> Iterator[str]:
    """Keys whose shape is not the table's, each with what was expected."""
    sizes: dict[str, int] = {}
    for pattern, text in table.items():
        names = text.split()
        for key in _keys(pattern, shapes):
            shape = shapes.get(key)
            if shape is None:
                continue
            if len(shape) == len(names) and all(shape):
                for name, size in zip(names, shape, strict=True):
                    sizes.setdefault(name, int(name) if name.isdecimal() else size)
                if all(n == "*" or sizes[n] == s for n, s in zip(names, shape, strict=True)):
                    continue
            expected = ", ".join(str(sizes.get(n, n)) if n != "*" else "any" for n in names)
            yield f"{key} is {shape}, expected ({expected})"


def _keys(pattern: str, shapes: Shapes) -> Iterator[str]:
    """The keys a pattern stands for; with no index at all, index 0."""
    prefix, hash_, suffix = pattern.partition(".#")
    if not hash_:
        yield pattern
        return
    for index in range(max(1, shapes.count(prefix))):
        yield from _keys(f"{prefix}.{index}{suffix}", shapes)
