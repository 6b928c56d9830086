"""A rule's prompts and a volume → structures in the volume's voxels.

A template is one of:

- {"structures": […]}: prompts in voxels, as in the file of `run --prompts`;
- {"relative": true, "structures": […]}: the same in fractions of the volume, 0…1 along each axis;
- {"template": "whole"}: one box around everything;
- {"template": "body"}: one click in the middle of the body, which a threshold finds;
- {"template": "study"}: prompts that a viewer stored for the series; see `study_prompts`;
- {"template": "none"}: no prompts, for a network that needs none.

Templates that are named may have `name` or `class`, as a structure has.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from medsa_deploy.errors import PromptError
from medsa_deploy.images import Volume
from medsa_deploy.images.class_codes import SegmentStyle
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime.volumes.structures import Structure
from medsa_deploy.stages.run.prompt_file import parsed_structure, parsed_style

Kind = Literal["voxels", "relative", "whole", "body", "study", "none"]
NAMED = ("whole", "body", "study", "none")
SAMPLED_SLICES = 32
"""Slices that the body is looked for in, spread over the volume."""
BODY_PART_OF_SLICE = 0.02
"""A slice with less of it above the threshold holds no body."""
HISTOGRAM_BINS = 256


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Where the prompts of a series come from."""

    kind: Kind
    structures: tuple[Structure, ...] = ()
    """In voxels, or in fractions of the volume."""
    name: str | None = None
    class_name: str | None = None
    styles: Mapping[str, SegmentStyle] = field(default_factory=dict)


def parse_template(data: Any, place: str) -> PromptTemplate:
    """A template of a rule's JSON; PromptError, which starts with `place`, says what is wrong."""
    if not isinstance(data, dict):
        raise PromptError(f"{place}: its prompts should be an object, found {reprlib.repr(data)}")
    if "template" in data:
        kind = data["template"]
        if kind not in NAMED or not set(data) <= {"template", "name", "class"}:
            raise PromptError(
                f"{place}: its template is {reprlib.repr(kind)}, expected one of "
                f"{', '.join(NAMED)}, with a "
                "name or a class"
            )
        return PromptTemplate(
            kind=cast(Kind, kind),
            name=_text(data, "name", place),
            class_name=_text(data, "class", place),
        )
    entries, relative = data.get("structures"), data.get("relative", False)
    if not isinstance(entries, list) or not entries or not set(data) <= {"structures", "relative"}:
        raise PromptError(f'{place}: its prompts should hold "structures" or a "template"')
    if not isinstance(relative, bool):
        raise PromptError(f"{place}: relative is {reprlib.repr(relative)}, expected true or false")
    places = [f"{place}: structure {i}" for i in range(1, len(entries) + 1)]
    parsed = [parsed_structure(*each) for each in zip(entries, places, strict=True)]
    styles = [parsed_style(*each) for each in zip(entries, places, strict=True)]
    if relative:
        for structure, each_place in zip(parsed, places, strict=True):
            _check_fractions(structure, each_place)
    return PromptTemplate(
        kind="relative" if relative else "voxels",
        structures=tuple(parsed),
        styles={
            structure.name or structure.class_name or "": style
            for structure, style in zip(parsed, styles, strict=True)
            if style is not None
        },
    )


def template_structures(template: PromptTemplate, volume: Volume) -> list[Structure]:
    """The structures of every template but "study"; none for a network that needs no prompt.

    PromptError if no body is found.
    """
    named = Structure(name=template.name, class_name=template.class_name)
    match template.kind:
        case "voxels":
            return list(template.structures)
        case "relative":
            return [in_voxels(structure, volume) for structure in template.structures]
        case "whole":
            x, y, z = volume.shape
            return [replace(named, boxes=((0, 0, 0, x, y, z),))]
        case "body":
            return [replace(named, points=(body_middle(volume),), labels=(1,))]
        case _:
            return []


def in_voxels(structure: Structure, volume: Volume) -> Structure:
    """A structure in fractions of the volume → the same in its voxels; slices are whole numbers.

    >>> half = Structure(boxes=((0, 0, 0, 0.5, 1, 1),))
    >>> in_voxels(half, read_volume("head.npy")).boxes  # (3, 4, 5), sliced along x
    ((0.0, 0.0, 0.0, 2.0, 4.0, 5.0),)
    """
    size = np.array(volume.shape, np.float64)
    points = []
    for fractions in structure.points:
        point = np.clip(np.array(fractions) * size - 0.5, 0, size - 1)
        point[volume.axis] = np.rint(point[volume.axis])
        points.append((float(point[0]), float(point[1]), float(point[2])))
    return replace(
        structure,
        points=tuple(points),
        boxes=tuple(_voxel_box(box, size, volume.axis) for box in structure.boxes),
    )


def _voxel_box(fractions: VolumeBox, size: np.ndarray, axis: int) -> VolumeBox:
    """A box in voxels that holds at least one slice."""
    low, high = np.array(fractions[:3]) * size, np.array(fractions[3:]) * size
    low[axis] = min(np.rint(low[axis]), size[axis] - 1)
    high[axis] = max(np.rint(high[axis]), low[axis] + 1)
    x0, y0, z0, x1, y1, z1 = (float(v) for v in (*low, *high))
    return x0, y0, z0, x1, y1, z1


def body_middle(volume: Volume) -> tuple[float, float, float]:
    """The voxel in the middle of the body, x, y, z; PromptError if there is none.

    The body is what is brighter than Otsu's threshold of the sampled slices; the voxel is that of
    the body which is nearest to its centre, in the middle of the slices that hold some of it.
    """
    step = 1 + (len(volume) - 1) // SAMPLED_SLICES
    indices = list(range(step // 2, len(volume), step))
    planes = [_grey(volume, index) for index in indices]
    values = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    limit = otsu_threshold(values)
    bodies = [np.nan_to_num(plane, nan=-np.inf) > limit for plane in planes]
    holding = [k for k, body in enumerate(bodies) if body.mean() > BODY_PART_OF_SLICE]
    if not holding:
        raise PromptError(f"{volume.path}: no body was found above the threshold {limit:g}")
    middle = holding[len(holding) // 2]
    inside = np.argwhere(bodies[middle])
    nearest = inside[np.linalg.norm(inside - inside.mean(axis=0), axis=1).argmin()]
    y, x = nearest.tolist()
    return volume.voxel(indices[middle], x, y)


def _grey(volume: Volume, index: int) -> np.ndarray:
    """One slice, (H, W) float64, bright where there is tissue; NaN where the file marks padding."""
    image = volume.slice(index)
    pixels = np.asarray(image.pixels, np.float64)
    pixels = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    pixels = -pixels if volume.inverted else pixels
    return pixels if image.background is None else np.where(image.background, np.nan, pixels)


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that parts values (N,) best into two groups (Otsu 1979).

    >>> otsu_threshold(np.array([0.0, 1, 9, 10]))
    5.0
    """
    counts, edges = np.histogram(values, HISTOGRAM_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = len(values) - below
    sums = np.cumsum(counts * centres)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = below * above * (means[0] - means[1]) ** 2
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float((edges[1:-1][best[0]] + edges[1:-1][best[-1]]) / 2)


def _check_fractions(structure: Structure, place: str) -> None:
    """PromptError for a coordinate outside 0…1, or a box that is empty."""
    rows = (*structure.points, *structure.boxes)
    if not all(0 <= value <= 1 for row in rows for value in row):
        raise PromptError(f"{place}: relative coordinates are fractions of the volume, 0…1")
    for box in structure.boxes:
        if not all(low < high for low, high in zip(box[:3], box[3:], strict=True)):
            raise PromptError(f"{place}: a box should be x0, y0, z0, x1, y1, z1 with each 0 < 1")


def _text(data: Mapping[str, Any], key: str, place: str) -> str | None:
    value = data.get(key)
    if value is not None and not (isinstance(value, str) and value.strip() and value.isprintable()):
        text = reprlib.repr(value)
        raise PromptError(f"{place}: its {key} should be one line of text, found {text}")
    return value
