"""Outputs of two networks on the same cases → how much they differ.

A case is an image with prompt sets. The checkpoint's own network and a bundle's graphs run the same
cases through the same session code; what differs is the network alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from . import transforms
from .errors import BundleError, ImageError, ParityError
from .images import Image, read_volume
from .manifest import Parity, TensorParity
from .runtime import Embedding, Session
from .runtime.decoding import decode
from .transforms import Frame, Prompt

Array = NDArray[np.float32]

RELATIVE_L2_LIMIT = 1e-4
"""Above this, an exported float32 graph is not the checkpoint's network."""
MASK_PIXELS_LIMIT = 1e-4
"""Largest share of a case's mask pixels that may differ."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a precision may differ by; None where nothing is asked."""

    relative_l2: float | None = None
    mask_pixels: float | None = None
    dice_mean: float | None = None
    dice_worst: float | None = None


DICE_TOLERANCE = 0.02
"""By how much mean mask Dice may be below that of another machine: INT8 kernels round their own
way, and the saved reference's masks are of noise."""
FLOAT32_LIMITS = Limits(relative_l2=RELATIVE_L2_LIMIT, mask_pixels=MASK_PIXELS_LIMIT)
LIMITS = {
    "fp16": Limits(dice_mean=0.995, dice_worst=0.98),
    "bf16": Limits(dice_mean=0.995, dice_worst=0.98),
    "int8": Limits(dice_mean=0.99),
    "int8-cpu": Limits(dice_mean=0.99),
    "int8-bf16": Limits(dice_mean=0.99),
}
"""Limits by precision; any other has float32's."""
TENSORS = ("image_embeddings", "low_res_masks", "iou_predictions")
"""What is compared, in the order it is computed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """An image, or neighbouring slices of a volume, and prompt sets.

    Set i is decoded on slice i, each starting again from the first when they run out.
    """

    name: str
    images: Sequence[Image]
    """One for a network that sees single images, a chunk's slices for one that sees depth."""
    prompts: Sequence[Prompt]
    seeded: bool

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(slice, prompt set) of everything that is decoded."""
        slices, sets = len(self.images), len(self.prompts)
        return [(i % slices, i % sets) for i in range(max(slices, sets))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What a network gave for one case."""

    tensors: dict[str, Array]
    """`image_embeddings` (D, 256, g, g) of D slices, and of every pair of slice and prompt set
    `low_res_masks` (n, K, 4g, 4g) and `iou_predictions` (n, K)."""
    frame: Frame


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How one case's outputs differ from the expected ones."""

    case: str
    tensors: dict[str, TensorParity]
    mask_pixels_differing: float
    """Share of the pixels of all the case's masks, at the image's size."""
    mask_dice: tuple[float, ...]
    """Of each mask, P·K of them."""


def seeded_image(size: int, seed: int | list[int]) -> NDArray[np.uint8]:
    """A smooth, detailed colour image of (size, size, 3) uint8: noise of several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3), np.float32)
    for octave, weight in ((4, 1.0), (12, 0.6), (48, 0.3)):
        noise = rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8)
        enlarged = PillowImage.fromarray(noise).resize((size, size), PillowImage.Resampling.BICUBIC)
        total += weight * np.asarray(enlarged, np.float32)
    low, high = float(total.min()), float(total.max())
    return np.asarray(np.rint((total - low) / (high - low) * 255), np.uint8)


def seeded_prompts(height: int, width: int, mask_size: int | None, seed: int) -> list[Prompt]:
    """Prompt sets of every kind on an image: clicks, a box, a box with a click, a mask.

    `mask_size`: side of the mask; None for a network without mask prompts.
    """
    rng = np.random.default_rng([seed, height, width])

    def clicks(count: int) -> Array:
        return (rng.random((count, 2)) * (width - 1, height - 1)).astype(np.float32)

    def box() -> Array:
        low, high = rng.random(2) * 0.4, 0.6 + rng.random(2) * 0.4
        corners = np.concatenate([low, high]) * (width, height, width, height)
        return corners.astype(np.float32)

    coarse = PillowImage.fromarray(rng.normal(0, 4, (6, 6)).astype(np.float32))
    none: Array = np.zeros((0, 2), np.float32)
    one = np.ones(1, np.float32)
    mixed = np.array([1, 0, 1], np.float32)
    sets = [
        Prompt(points=clicks(1), labels=one, box=None, mask=None),
        Prompt(points=clicks(3), labels=mixed, box=None, mask=None),
        Prompt(points=none, labels=none[:, 0], box=box(), mask=None),
        Prompt(points=clicks(1), labels=one, box=box(), mask=None),
    ]
    if mask_size is not None:
        mask = coarse.resize((mask_size, mask_size), PillowImage.Resampling.BILINEAR)
        masked = Prompt(points=clicks(1), labels=one, box=None, mask=np.asarray(mask, np.float32))
        sets.append(masked)
    return sets


def seeded_case(image_size: int, mask_size: int | None, seed: int, slices: int = 1) -> Case:
    """A case made of nothing but a seed."""
    pixels = [seeded_image(image_size, [seed, i] if i else seed) for i in range(slices)]
    return Case(
        name=f"seed {seed}",
        images=[Image(pixels=one, path=Path(f"seed-{seed}")) for one in pixels],
        prompts=seeded_prompts(image_size, image_size, mask_size, seed),
        seeded=True,
    )


def image_case(name: str, images: Sequence[Image], mask_size: int | None) -> Case:
    """A case on a user's image or slices, with prompts of every kind."""
    height, width = images[0].pixels.shape[:2]
    return Case(
        name=name,
        images=images,
        prompts=seeded_prompts(height, width, mask_size, 0),
        seeded=False,
    )


def middle_slices(path: Path, chunk: int) -> list[Image]:
    """`chunk` slices from the middle of a volume."""
    volume = read_volume(path)
    if len(volume) < chunk:
        raise ImageError(
            f"{path} has {len(volume)} slices; this network sees {chunk} at a time: give a volume "
            "of as many"
        )
    start = (len(volume) - chunk) // 2
    return [volume.slice(start + i) for i in range(chunk)]


def run_case(session: Session, case: Case) -> Outputs:
    """Encode the case's images and decode its prompt sets, with the decoder whole."""
    return decode_case(session, case, session.encode_slices(case.images), split=False)


def decode_case(
    session: Session, case: Case, embeddings: Sequence[Embedding], *, split: bool
) -> Outputs:
    """Decode a case's prompt sets on its embeddings, with the decoder in two parts or whole."""
    if not split:
        embeddings = [replace(embedding, image_part=None) for embedding in embeddings]
    decoded = []
    for i, embedding in enumerate(embeddings):
        sets = [case.prompts[j] for slice_, j in case.pairs if slice_ == i]
        decoded.append(decode(session.backend, session.manifest, embedding, sets))
    values = [embedding.values for embedding in embeddings]
    parts = (values, *zip(*decoded, strict=True))
    return Outputs(
        tensors={name: np.concatenate(p) for name, p in zip(TENSORS, parts, strict=True)},
        frame=embeddings[0].frame,
    )


def compare(case: Case, expected: Outputs, actual: Outputs, threshold: float) -> Comparison:
    """Difference of two networks' outputs; `threshold` is the masks' probability."""
    cut = transforms.probability_to_logit(threshold)
    tensors = {
        name: difference(value, actual.tensors[name]) for name, value in expected.tensors.items()
    }
    masks = [
        transforms.upsample(outputs.tensors["low_res_masks"], outputs.frame) > cut
        for outputs in (expected, actual)
    ]
    return Comparison(
        case=case.name,
        tensors=tensors,
        # of all masks together: one logit that is 0 up to rounding is 1.6e-4 of one 80×80 mask
        mask_pixels_differing=float((masks[0] != masks[1]).mean()),
        mask_dice=dice(*masks),
    )


def dice(expected: NDArray[np.bool_], actual: NDArray[np.bool_]) -> tuple[float, ...]:
    """2·|A ∩ B| / (|A| + |B|) of each mask (…, H, W); two empty masks are equal, so 1."""
    both = (expected & actual).sum((-2, -1)).ravel()
    either = (expected.sum((-2, -1)) + actual.sum((-2, -1))).ravel()
    return tuple(float(2 * b / e) if e else 1.0 for b, e in zip(both, either, strict=True))


def difference(expected: Array, actual: Array) -> TensorParity:
    """Relative L2 ‖a − e‖ / ‖e‖ and largest absolute difference; ParityError for other shapes."""
    if expected.shape != actual.shape:
        raise ParityError(
            f"the networks give different shapes: {actual.shape}, expected {expected.shape}"
        )
    e, a = expected.astype(np.float64), actual.astype(np.float64)
    return TensorParity(
        relative_l2=float(np.linalg.norm(a - e)) / max(float(np.linalg.norm(e)), 1e-30),
        max_abs=float(np.abs(a - e).max()),
    )


def summarise(
    cases: Sequence[Case],
    comparisons: Iterable[Comparison],
    *,
    precision: str,
    backend: str,
    nan_count: int = 0,
    split: Parity | None = None,
    encoders: Mapping[str, Parity] | None = None,
) -> Parity:
    """The worst of all cases, as the manifest records it.

    `nan_count`: values that were NaN or infinite, and compared as 0. `split`: the same with the
    decoder in two parts. `encoders`: with a backend's own encoder, by role.
    """
    found = list(comparisons)
    return Parity(
        precision=precision,
        backend=backend,
        images=sum(not case.seeded for case in cases),
        seeded_images=sum(case.seeded for case in cases),
        prompt_sets=sum(len(case.prompts) for case in cases),
        tensors={
            name: TensorParity(
                relative_l2=max(c.tensors[name].relative_l2 for c in found),
                max_abs=max(c.tensors[name].max_abs for c in found),
            )
            for name in found[0].tensors
        },
        mask_pixels_differing=max(c.mask_pixels_differing for c in found),
        mask_dice_mean=float(np.mean([value for c in found for value in c.mask_dice])),
        mask_dice_worst=min(min(c.mask_dice) for c in found),
        nan_count=nan_count,
        split=split,
        encoders=dict(encoders or {}),
    )


def limits_of(precision: str, recorded_dice: float | None = None) -> Limits:
    """The limits of a precision; of Dice, those that follow from `recorded_dice` where it is given.

    That is the mean mask Dice of an earlier run on the same cases.
    """
    if recorded_dice is not None:
        return Limits(dice_mean=recorded_dice - DICE_TOLERANCE)
    return LIMITS.get(precision, FLOAT32_LIMITS)


def failures(parity: Parity, limits: Limits | None = None) -> list[str]:
    """What exceeds the limits, by default the precision's, in words; empty when the proof holds."""
    limits = limits or limits_of(parity.precision)
    found = _failures(parity, limits)
    others = {"decoder in two parts": parity.split, **parity.encoders}
    for form, other in others.items():
        if other is not None:
            found += [f"{form}: {problem}" for problem in failures(other, limits)]
    return found


def _failures(parity: Parity, limits: Limits) -> list[str]:
    found = [f"{parity.nan_count} values are NaN or infinite"] if parity.nan_count else []
    if limits.relative_l2 is not None:
        found += [
            f"{name}: relative L2 {tensor.relative_l2:.1e} > {limits.relative_l2:.0e}"
            for name, tensor in parity.tensors.items()
            if not tensor.relative_l2 <= limits.relative_l2
        ]
    if limits.mask_pixels is not None and not parity.mask_pixels_differing <= limits.mask_pixels:
        share = parity.mask_pixels_differing
        found.append(f"{share:.1e} of mask pixels differ > {limits.mask_pixels:.0e}")
    for word, value, limit in (
        ("mean", parity.mask_dice_mean, limits.dice_mean),
        ("worst", parity.mask_dice_worst, limits.dice_worst),
    ):
        if limit is not None and not (value is not None and value >= limit):
            found.append(
                f"{word} mask Dice {value if value is None else f'{value:.4f}'} < {limit:.4g}"
            )
    return found


def require(parity: Parity) -> None:
    """ParityError when the graphs are not the checkpoint's network."""
    if problems := failures(parity):
        raise ParityError(
            f"the {parity.precision} graphs in {parity.backend} are not the checkpoint's network: "
            + "; ".join(problems)
        )


def save_reference(path: Path, case: Case, outputs: Outputs) -> None:
    """Write a case and what the checkpoint's network gave for it, to verify against anywhere."""
    pixels = np.stack([image.pixels for image in case.images])
    arrays: dict[str, NDArray[np.generic]] = {"images": pixels, **outputs.tensors}
    for i, prompt in enumerate(case.prompts):
        parts = {"points": prompt.points, "labels": prompt.labels}
        parts |= {} if prompt.box is None else {"box": prompt.box}
        parts |= {} if prompt.mask is None else {"mask": prompt.mask}
        arrays |= {f"prompt.{i}.{name}": part for name, part in parts.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_reference(path: Path) -> tuple[Case, dict[str, Array]]:
    """A saved case and the tensors expected for it; BundleError for a file that is none."""
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as data:
            arrays = dict(data)
        sets = len({name.split(".")[1] for name in arrays if name.startswith("prompt.")})
        case = Case(
            name="saved reference",
            images=[Image(pixels=pixels, path=path) for pixels in arrays["images"]],
            prompts=[
                Prompt(
                    points=arrays[f"prompt.{i}.points"],
                    labels=arrays[f"prompt.{i}.labels"],
                    box=arrays.get(f"prompt.{i}.box"),
                    mask=arrays.get(f"prompt.{i}.mask"),
                )
                for i in range(sets)
            ],
            seeded=True,
        )
        return case, {name: arrays[name] for name in TENSORS}
    except Exception as e:  # numpy and zipfile raise nearly anything over a damaged archive
        raise BundleError(
            f"{path} is not a reference that medsa-deploy wrote ({e}): export the checkpoint again"
        ) from e
