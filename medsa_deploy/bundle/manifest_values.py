"""A manifest's values → BundleError for the first that no bundle can have.

`strict_json` checks the types. A value of the right type may still be one that no network has, such
as an image size of −1, or one that contradicts another, such as two sizes of an image.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import unicodedata
from collections.abc import Iterator
from typing import Any

from medsa_deploy.errors import BundleError

from .manifest_text import MANIFEST_FILENAME

Span = tuple[float, float]
MOST_CHARACTERS = 1000
_COUNT: Span = (0, 10**12)
_SHARE: Span = (0, 1)
_PROBABILITY: Span = (5e-324, 1 - 2**-53)
"""Above 0 and below 1: every float between them."""
_DIFFERENCE: Span = (0, float("inf"))

RANGES: dict[tuple[str, str], Span] = {
    ("Network", "widths"): (1, 2**16),
    ("Network", "depths"): (1, 1024),
    ("Network", "heads"): (0, 1024),
    ("Network", "windows"): (0, 4096),
    ("Network", "global_blocks"): (0, 1023),
    ("Network", "image_size"): (1, 2**14),
    ("Network", "embedding_size"): (1, 2**12),
    ("Network", "patch_size"): (1, 1024),
    ("Network", "parameters"): _COUNT,
    ("Network", "adapter_parameters"): _COUNT,
    ("Network", "mask_tokens"): (1, 2**16),
    ("Network", "classes"): (1, 2**16),
    ("Network", "hyp_lengths"): (1, 2**20),
    ("Network", "hyp_prompt_length"): (0, 2**20),
    ("Network", "depth_chunk"): (1, 4096),
    ("Network", "slices"): (1, 4096),
    ("Conventions", "point_scale"): (1e-6, 1e6),
    ("Conventions", "pad_points"): (0, 4096),
    ("Conventions", "intensity_window"): (-1e30, 1e30),
    ("Conventions", "threshold"): _PROBABILITY,
    ("Tensor", "shape"): (1, 2**31 - 1),
    ("File", "bytes"): (0, 2**53),
    ("File", "opset"): (1, 1000),
    ("TensorParity", "relative_l2"): _DIFFERENCE,
    ("TensorParity", "max_abs"): _DIFFERENCE,
    ("Parity", "images"): _COUNT,
    ("Parity", "seeded_images"): _COUNT,
    ("Parity", "prompt_sets"): _COUNT,
    ("Parity", "mask_pixels_differing"): _SHARE,
    ("Parity", "mask_dice_mean"): _SHARE,
    ("Parity", "mask_dice_worst"): _SHARE,
    ("Parity", "nan_count"): _COUNT,
    ("Calibration", "images"): _COUNT,
    ("Island", "nodes"): _COUNT,
    ("Recipe", "rounded_dice_mean"): _SHARE,
    ("Recipe", "rounded_dice_worst"): _SHARE,
    ("Recipe", "reference_dice_mean"): _SHARE,
    ("Recipe", "runs"): _COUNT,
    ("Manifest", "schema"): _COUNT,
}
"""Dataclass and field → the smallest and largest number that the field may hold."""


def check_values(manifest: Any) -> None:
    """BundleError names the first value that is out of its range or contradicts another.

    `manifest`: a `Manifest`.
    """
    for place, owner, field, value in _values(manifest, "Manifest", "", MANIFEST_FILENAME):
        if isinstance(value, str):
            _check_text(place, value)
        elif not isinstance(value, bool) and isinstance(value, int | float):
            low, high = RANGES[owner, field]
            if not low <= value <= high:
                _refuse(place, value, _words(low, high, is_integer=isinstance(value, int)))
    _check_files(manifest.files)
    _check_window(manifest.conventions.intensity_window)
    _check_classes(manifest)
    _check_graphs(manifest)


def _values(value: Any, owner: str, field: str, place: str) -> Iterator[tuple[str, str, str, Any]]:
    """Place, dataclass, field and value of every scalar, keys of objects included."""
    if dataclasses.is_dataclass(value):
        name = type(value).__name__
        for part in dataclasses.fields(value):
            inner = getattr(value, part.name)
            yield from _values(inner, name, part.name, f"{place}: {part.name}")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _values(item, owner, field, f"{place}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"a key of {place}", owner, field, key
            yield from _values(item, owner, field, f"{place}: {reprlib.repr(key)}")
    else:
        yield place, owner, field, value


def _words(low: float, high: float, *, is_integer: bool) -> str:
    """A range in words."""
    if (low, high) == _PROBABILITY:
        return "a number above 0 and below 1"
    return f"a {'whole ' * is_integer}number from {low:g} to {high:g}"


def _check_text(place: str, text: str) -> None:
    """Texts are printed and written to files, so control characters are refused."""
    if len(text) > MOST_CHARACTERS:
        _refuse(place, text, f"at most {MOST_CHARACTERS} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        _refuse(place, text, "printable characters")


def _check_files(files: Any) -> None:
    """Paths are relative, inside the bundle, and have one SHA-256 each."""
    digests: dict[str, str] = {}
    for file in files:
        parts = file.path.split("/")
        if ".." in parts or not parts[0]:
            place = f"{MANIFEST_FILENAME} names a file outside the bundle: files"
            _refuse(place, file.path, "a path inside the bundle")
        if any(part in ("", ".") or part.startswith(".git") for part in parts) or (
            "\\" in file.path or ":" in file.path
        ):
            _refuse(f"{MANIFEST_FILENAME}: files", file.path, "a path inside the bundle")
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            _refuse(f"{MANIFEST_FILENAME}: files: sha256", file.sha256, "64 hexadecimal digits")
        if digests.setdefault(file.path, file.sha256) != file.sha256:
            _refuse(f"{MANIFEST_FILENAME}: files", file.path, "one SHA-256 for each path")


def _check_window(window: tuple[float, float] | None) -> None:
    if window is not None and not window[0] < window[1]:
        place = f"{MANIFEST_FILENAME}: conventions: intensity_window"
        _refuse(place, window, "a low and a higher intensity")


def _check_classes(manifest: Any) -> None:
    names, classes = manifest.conventions.class_names, manifest.network.classes
    if names and len(names) != classes:
        place = f"{MANIFEST_FILENAME}: conventions: class_names"
        _refuse(place, names, f"the names of {classes} classes, or none")


def _check_graphs(manifest: Any) -> None:
    """The sizes of encoder and decoder are those of the network."""
    network, graphs = manifest.network, manifest.graphs
    side, grid = network.image_size, network.embedding_size
    expected = {
        ("encoder", "inputs", "image"): (3, side, side),
        ("encoder", "outputs", "image_embeddings"): (grid, grid),
        ("decoder", "inputs", "image_embeddings"): (grid, grid),
        ("decoder", "inputs", "point_coords"): (2,),
        ("decoder", "outputs", "low_res_masks"): (network.masks, 4 * grid, 4 * grid),
        ("decoder", "outputs", "iou_predictions"): (network.masks,),
    }
    for (graph, direction, name), sizes in expected.items():
        place = f"{MANIFEST_FILENAME}: graphs: {graph}: {direction}"
        if graph not in graphs:
            _refuse(f"{MANIFEST_FILENAME}: graphs", sorted(graphs), f"the graph {graph}")
        shapes = [t.shape for t in getattr(graphs[graph], direction) if t.name == name]
        if len(shapes) != 1:
            names = [t.name for t in getattr(graphs[graph], direction)]
            _refuse(place, names, f"one tensor {name}")
        if shapes[0][-len(sizes) :] != sizes:
            _refuse(f"{place}: {name}", shapes[0], f"a shape that ends in {sizes}")


def _refuse(place: str, value: object, expected: str) -> None:
    raise BundleError(
        f"{place} is {reprlib.repr(value)}, expected {expected}; copy the bundle again or export "
        "it again"
    )
