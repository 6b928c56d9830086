"""The manifest's tensor contract → the check of a graph's tensors, and the decoder's inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import BundleError

from .interface import Array

Opened = tuple[str, str, Sequence[int | str | None]]
"""Name, dtype and shape of a file's tensor; the length of a dynamic axis is not a number."""


def check_contract(
    path: Path,
    opened: Iterable[Opened],
    graph: GraphContract,
    axis_ranges: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """BundleError unless the file's tensors have the manifest's names, types and fixed axes.

    axis_ranges: see `axis_ranges`; an engine's axis may be static at a size within its range.
    """
    described = (*graph.inputs, *graph.outputs)
    named = {tensor.name: tensor.shape for tensor in described}
    actual = {
        name: f"{dtype} {_axes(_without_static(shape, named.get(name, ()), axis_ranges or {}))}"
        for name, dtype, shape in opened
    }
    expected = {t.name: f"{t.dtype} {_axes(t.shape)}" for t in described}
    differing = [
        f"{name} is {actual.get(name, 'absent')}, the manifest says {expected.get(name, 'absent')}"
        for name in expected | actual
        if actual.get(name) != expected.get(name)
    ]
    if differing:
        raise BundleError(
            f"{path} is not the graph its manifest describes: {'; '.join(differing)}: "
            "export the checkpoint again"
        )


def axis_ranges(
    graph: GraphContract,
    smallest: Mapping[str, Sequence[int]],
    largest: Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, int]]:
    """Smallest and largest size of each named axis of an engine, outputs included.

    smallest, largest: input → its shape in the only optimization profile. An axis that cannot vary
    there is static in the engine. `max(E,P)` is as long as the longest axis that it names.
    """
    ranges = {
        axis: (smallest[tensor.name][i], largest[tensor.name][i])
        for tensor in graph.inputs
        for i, axis in enumerate(tensor.shape)
        if isinstance(axis, str)
    }
    for axis in {axis for tensor in graph.outputs for axis in tensor.shape}:
        if isinstance(axis, str) and axis not in ranges:
            parts = [ranges[part] for part in re.findall(r"\w+", axis) if part in ranges]
            if parts:
                ranges[axis] = max(low for low, _ in parts), max(high for _, high in parts)
    return ranges


def mask_shape(decoder: GraphContract) -> tuple[int, ...] | None:
    """Shape of one mask prompt, (1, 4g, 4g); None for a decoder without mask prompts."""
    shapes = (t.shape for t in decoder.inputs if t.name == "mask_input")
    return next((tuple(axis for axis in s if isinstance(axis, int)) for s in shapes), None)


def decoder_inputs(
    image_embeddings: Array,
    point_coords: Array,
    point_labels: Array,
    mask: Array | None,
    mask_shape: tuple[int, ...] | None,
) -> dict[str, Array]:
    """The arguments of `Backend.decode` as the decoder's inputs, by name."""
    inputs = {
        "image_embeddings": image_embeddings,
        "point_coords": point_coords,
        "point_labels": point_labels,
    }
    if mask_shape is not None:
        no_mask = np.zeros((len(point_coords), *mask_shape), np.float32)
        inputs["mask_input"] = no_mask if mask is None else mask
        inputs["has_mask_input"] = np.array([mask is not None], np.float32)
    return inputs


def _without_static(
    shape: Sequence[int | str | None],
    axes: Sequence[int | str],
    ranges: Mapping[str, tuple[int, int]],
) -> Sequence[int | str | None]:
    """A shape in which a size within the range of the manifest's named axis is None, as dynamic."""
    if len(shape) != len(axes):
        return shape
    return [
        None
        if isinstance(size, int) and isinstance(axis, str) and _within(size, ranges.get(axis))
        else size
        for size, axis in zip(shape, axes, strict=True)
    ]


def _within(size: int, limits: tuple[int, int] | None) -> bool:
    return limits is not None and limits[0] <= size <= limits[1]


def _axes(shape: Sequence[int | str | None]) -> str:
    """A shape in words; a dynamic axis is *, whatever its name."""
    return f"({', '.join(str(axis) if isinstance(axis, int) else '*' for axis in shape)})"
