"""An image → the image at another size, as Pillow, scikit-image, OpenCV, torch or SciPy resizes it.

The networks saw images resized by these libraries, but the runtime depends on Pillow alone. The
filters of the others are separable. Each is written as *taps*: for every output sample of an axis,
the input samples it reads and their weights. Taps are laid out as a banded matrix and applied to
each axis in turn: `rows @ image @ columns.T`. Taps compose, so two resizes cost as much as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Filter = Literal["bilinear", "cubic", "area", "linear", "nearest", "spline"]

BLOCK = 64
"""Output samples per block of a banded matrix. 256² → 1024² in float32 on two CPU cores took 2.0 ms
with 16, 0.9 ms with 64, 1.9 ms with 256 and 4.4 ms as one dense matrix."""

CUBIC_POLE = math.sqrt(3) - 2
"""Pole of the cubic B-spline's inverse filter."""

CUBIC_REACH = 28
"""Samples to either side after which |CUBIC_POLE|^k is below float64's precision."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps:
    """The input samples, of n on an axis, that each of m output samples reads."""

    indices: NDArray[np.intp]
    """(m, t), each 0…n−1; an index may occur more than once in a row."""
    weights: NDArray[np.float64]
    """(m, t); every row sums to 1, or to 0 for an output sample outside of the input."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """A banded (m, n) matrix, as dense blocks along its diagonal."""

    outputs: int
    """m"""
    blocks: tuple[tuple[slice, slice, NDArray[Any]], ...]
    """(output samples, input samples, weights between them), read-only."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Floating-point type of the weights and of the result."""
        return self.blocks[0][2].dtype


def resize(planes: NDArray[Any], size: tuple[int, int], filter_: Filter) -> NDArray[Any]:
    """(C, H, W) uint8 or float32 → (C, h, w), float32 or float64 unless Pillow keeps uint8.

    Antialiased are Pillow's `bilinear`, scikit-image's `cubic` and OpenCV's `area`. A uint8 image
    comes out of these in whole grey levels, as the libraries or their callers round them. Not
    antialiased are torch's `linear`, OpenCV's `nearest` and SciPy's cubic `spline`, which may
    overshoot the image's range; the code that uses them rounds nothing.
    """
    if filter_ == "bilinear":
        return _pillow_bilinear(planes, size)
    rows, columns = (
        resize_operator(FILTER_TAPS[filter_], n, m)
        for n, m in zip(planes.shape[1:], size, strict=True)
    )
    content = resample(planes, rows, columns)
    if filter_ not in ROUNDED:
        return content
    np.clip(content, float(planes.min()), float(planes.max()), out=content)
    if planes.dtype != np.uint8:
        return content
    return _truncated(content) if filter_ == "cubic" else _opencv_rounded(content, planes.shape[1:])


def bilinear_taps(n: int, m: int, *, extent: float | None = None) -> Taps:
    """Linear interpolation between sample centres, held at the ends, without antialiasing.

    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` on one axis. `extent`:
    the part of the axis that the output covers, in samples; None for all of it.
    """
    position = np.maximum(_centres(extent or n, m), 0)
    left = np.minimum(np.floor(position).astype(np.intp), n - 1)
    right = position - left
    return Taps(
        indices=np.stack([left, np.minimum(left + 1, n - 1)], axis=1),
        weights=np.stack([1 - right, right], axis=1),
    )


def bicubic_taps(n: int, m: int, *, extent: float | None = None) -> Taps:
    """Cubic convolution with a = −0.75, ends repeated, without antialiasing (Keys 1981).

    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` on one axis. `extent`: as
    for `bilinear_taps`.
    """
    position = _centres(extent or n, m)
    left = np.floor(position).astype(np.intp)
    t = position - left
    weights = [_cubic_far(t + 1), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t)]
    return Taps(
        indices=np.clip(left[:, None] + np.arange(-1, 3), 0, n - 1),
        weights=np.stack(weights, axis=1),
    )


def nearest_taps(n: int, m: int, *, extent: float | None = None) -> Taps:
    """The sample at or before each output sample's start.

    `torch.nn.functional.interpolate(mode="nearest")` on one axis, in its float32 arithmetic, which
    decides at the borders between samples. `extent`: as for `bilinear_taps`.
    """
    scale = np.float32((extent or n) / m)
    return _selecting(np.floor(np.arange(m, dtype=np.float32) * scale), n)


def opencv_nearest_taps(n: int, m: int) -> Taps:
    """The sample at or before each output sample's start: OpenCV's `INTER_NEAREST` on one axis."""
    return _selecting(np.floor(np.arange(m) * (1 / (m / n))), n)


def aligned_nearest_taps(n: int, m: int) -> Taps:
    """The nearest sample, first and last samples on each other; halves go to the later one.

    `scipy.ndimage.zoom(order=0)` on one axis; see `_within`.
    """
    position = _aligned(n, m)
    return _within(_selecting(np.floor(position + 0.5), n), position, n)


def area_taps(n: int, m: int) -> Taps:
    """Mean over the extent of each output sample: OpenCV's `INTER_AREA` on one axis.

    This is also right for enlarging. If an output sample straddles the border between two input
    samples, OpenCV blends them in proportion to its parts on either side.
    """
    scale = n / m
    start = np.arange(m)[:, None] * scale
    indices = np.floor(start).astype(np.intp) + np.arange(math.ceil(scale) + 1)
    covered = np.minimum(indices + 1, start + scale) - np.maximum(indices, start)
    covered = np.where(indices < n, np.maximum(covered, 0), 0)
    return Taps(
        indices=np.minimum(indices, n - 1),
        weights=covered / covered.sum(axis=1, keepdims=True),
    )


def cubic_taps(n: int, m: int) -> Taps:
    """Cubic B-spline interpolation with mirrored ends, after a Gaussian when reducing.

    `skimage.transform.resize(order=3, anti_aliasing=True)` on one axis: a Gaussian of sigma
    (n/m − 1)/2 cut at 4 sigma, the spline's inverse filter, and its values between the samples.
    All three are symmetric filters on a signal mirrored about its end samples, so they combine
    into one kernel on the mirrored signal.
    """
    if n == m:
        return Taps(indices=np.arange(n)[:, None], weights=np.ones((n, 1)))
    blur = _gaussian(max(0.0, (n / m - 1) / 2))
    return _spline_taps(np.convolve(blur, _inverse_spline()), _centres(n, m), n)


def aligned_spline_taps(n: int, m: int) -> Taps:
    """Cubic B-spline interpolation with mirrored ends, first and last samples on each other.

    `scipy.ndimage.zoom(order=3)` on one axis; see `_within`.
    """
    if n == m:
        return Taps(indices=np.arange(n)[:, None], weights=np.ones((n, 1)))
    position = _aligned(n, m)
    return _within(_spline_taps(_inverse_spline(), position, n), position, n)


FILTER_TAPS: Mapping[Filter, Callable[[int, int], Taps]] = {
    "cubic": cubic_taps,
    "area": area_taps,
    "linear": bilinear_taps,
    "nearest": opencv_nearest_taps,
    "spline": aligned_spline_taps,
}
"""The filters that are made of taps; Pillow's arithmetic is its own."""
ROUNDED = frozenset({"cubic", "area"})
"""The filters whose result is cut to the image's range, and to whole levels if the image is."""


def _spline_taps(kernel: NDArray[np.float64], position: NDArray[np.float64], n: int) -> Taps:
    """The spline whose coefficients are the samples filtered with `kernel`, at positions (m,)."""
    m, reach = len(position), len(kernel) // 2
    left = np.floor(position).astype(np.intp)
    weights = np.zeros((m, len(kernel) + 3))
    for k, weight in enumerate(_spline_weights(position - left)):
        weights[:, k : k + len(kernel)] += weight[:, None] * kernel
    reads = left[:, None] - 1 - reach + np.arange(len(kernel) + 3)
    return Taps(indices=_mirror(reads, n), weights=weights)


def crop(taps: Taps, m: int) -> Taps:
    """The first `m` output samples."""
    return Taps(indices=taps.indices[:m], weights=taps.weights[:m])


def compose(first: Taps, second: Taps) -> Taps:
    """One resize that equals `first` followed by `second`."""
    m = len(second.indices)
    return Taps(
        indices=first.indices[second.indices].reshape(m, -1),
        weights=(second.weights[:, :, None] * first.weights[second.indices]).reshape(m, -1),
    )


def banded(taps: Taps, dtype: DTypeLike) -> Operator:
    """Taps as a banded matrix of `dtype`, ready to be applied."""
    m = len(taps.indices)
    blocks = []
    for start in range(0, m, BLOCK):
        rows = slice(start, min(start + BLOCK, m))
        indices = taps.indices[rows]
        low, high = int(indices.min()), int(indices.max()) + 1
        weights = np.zeros((len(indices), high - low))
        np.add.at(weights, (np.arange(len(indices))[:, None], indices - low), taps.weights[rows])
        block = weights.astype(dtype)
        block.flags.writeable = False
        blocks.append((rows, slice(low, high), block))
    return Operator(outputs=m, blocks=tuple(blocks))


@lru_cache(maxsize=16)
def resize_operator(taps: Callable[[int, int], Taps], n: int, m: int) -> Operator:
    """The float64 operator that resizes an axis from n to m samples; a few MB at most."""
    return banded(taps(n, m), np.float64)


def resample(image: NDArray[Any], rows: Operator, columns: Operator) -> NDArray[Any]:
    """(…, H, W) of any real dtype → (…, h, w) in the operators' dtype: rows @ image @ columns.T."""
    lead, width, dtype = image.shape[:-2], image.shape[-1], rows.dtype
    tall = np.empty((*lead, rows.outputs, width), dtype)
    for out, source, weights in rows.blocks:
        # converted block by block: a large 8-bit image never exists whole in float64
        band = np.ascontiguousarray(image[..., source, :], dtype=dtype)
        np.matmul(weights, band, out=tall[..., out, :])
    result = np.empty((*lead, rows.outputs, columns.outputs), dtype)
    for out, source, weights in columns.blocks:
        np.matmul(tall[..., source], weights.T, out=result[..., out])
    return result


def _pillow_bilinear(planes: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """(C, H, W) → (C, h, w), same type: Pillow's 8-bit arithmetic for uint8, mode F for float32."""
    from PIL import Image

    h, w = size
    images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
    # Pillow 13 takes the axes of some tall images in the other order, which moves grey levels by
    # one; in two steps every version resizes as those that networks were trained with
    resized = (
        image.resize((w, image.height), Image.Resampling.BILINEAR).resize(
            (w, h), Image.Resampling.BILINEAR
        )
        for image in images
    )
    return np.stack([np.asarray(image) for image in resized])


def _truncated(content: NDArray[np.float64]) -> NDArray[np.float64]:
    """Whole grey levels as MedSAM takes them, by conversion to uint8."""
    # the tolerance is for round-off, which must not cost a flat region a grey level
    return np.floor(content + 1e-9)


def _opencv_rounded(
    content: NDArray[np.float64], image_size: tuple[int, ...]
) -> NDArray[np.float64]:
    """Whole grey levels as OpenCV takes them from an area resize of an image of (H, W)."""
    # halves go to even, but up in OpenCV's own path for exact halving: an eighth of the pixels then
    halving = image_size == (2 * content.shape[1], 2 * content.shape[2])
    return np.floor(content + 0.5) if halving else np.rint(content)


def _centres(n: float, m: int) -> NDArray[np.float64]:
    """(m,) centres of m equal parts of an axis of n samples, in samples."""
    return np.asarray((np.arange(m) + 0.5) * (n / m) - 0.5, np.float64)


def _aligned(n: int, m: int) -> NDArray[np.float64]:
    """(m,) positions from the first to the last of n samples, in samples."""
    return np.asarray(np.arange(m) * ((n - 1) / max(m - 1, 1)), np.float64)


def _within(taps: Taps, position: NDArray[np.float64], n: int) -> Taps:
    """Taps without those of positions beyond the last sample, which become 0.

    Round-off puts the last position there at some sizes. SciPy then gives 0, so a network trained
    with it has seen such borders.
    """
    inside = position <= n - 1
    return Taps(indices=taps.indices, weights=taps.weights * inside[:, None])


def _selecting(indices: NDArray[np.floating[Any]], n: int) -> Taps:
    """One sample for each output sample: whole numbers (m,), cut to 0…n−1."""
    samples = np.clip(indices.astype(np.intp), 0, n - 1)
    return Taps(indices=samples[:, None], weights=np.ones((len(samples), 1)))


def _cubic_near(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys's kernel with a = −0.75 within one sample of its centre."""
    return ((2 - 0.75) * x - (3 - 0.75)) * x * x + 1


def _cubic_far(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys's kernel with a = −0.75 one to two samples from its centre."""
    return -0.75 * (((x - 5) * x + 8) * x - 4)


def _gaussian(sigma: float) -> NDArray[np.float64]:
    """(2r+1,) normalised Gaussian, r = 4 sigma rounded; [1] when sigma is 0."""
    reach = int(4 * sigma + 0.5)
    if reach == 0:
        return np.ones(1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.asarray(kernel / np.sum(kernel), np.float64)


def _inverse_spline() -> NDArray[np.float64]:
    """(2·CUBIC_REACH+1,) filter that turns samples into cubic B-spline coefficients.

    Unser, Aldroubi and Eden 1993: −6z/(1−z²)·z^|k| with the pole z.
    """
    z = CUBIC_POLE
    distance = np.abs(np.arange(-CUBIC_REACH, CUBIC_REACH + 1))
    return np.asarray(-6 * z / (1 - z * z) * z**distance, np.float64)


def _spline_weights(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Four (m,) cubic B-spline weights of the samples −1, 0, 1, 2 around a position t in 0…1."""
    u = 1 - t
    return u**3 / 6, 2 / 3 - t**2 * (2 - t) / 2, 2 / 3 - u**2 * (2 - u) / 2, t**3 / 6


def _mirror(indices: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Indices reflected into 0…n−1 about the first and last sample, which are not repeated."""
    if n == 1:
        return np.zeros_like(indices)
    folded = np.mod(indices, 2 * n - 2)
    return np.asarray(np.minimum(folded, 2 * n - 2 - folded), np.intp)
