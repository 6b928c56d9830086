"""The manifest's tensor contract → the check of a graph's tensors, and the decoder's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import BundleError

from .interface import Array

Opened = tuple[str, str, Sequence[int | str | None]]
"""Name, dtype and shape of a file's tensor; the length of a dynamic axis is not a number."""


def check_contract(path: Path, opened: Iterable[Opened], graph: GraphContract) -> None:
    """BundleError unless the file's tensors have the manifest's names, types and fixed axes."""
    described = (*graph.inputs, *graph.outputs)
    actual = {name: f"{dtype} {_axes(shape)}" for name, dtype, shape in opened}
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


def _axes(shape: Sequence[int | str | None]) -> str:
    """A shape in words; a dynamic axis is *, whatever its name."""
    return f"({', '.join(str(axis) if isinstance(axis, int) else '*' for axis in shape)})"
