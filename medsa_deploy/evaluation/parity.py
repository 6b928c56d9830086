"""Outputs of two networks on the same cases → how much they differ.

A case is an image with prompt sets. The checkpoint's own network and a bundle's graphs run the same
cases through the same session code; what differs is the network alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest, Parity, TensorParity
from medsa_deploy.errors import BundleError, ParityError
from medsa_deploy.images import Image
from medsa_deploy.runtime import Embedding, Session
from medsa_deploy.runtime.backends.interface import Backend, ImagePart, as_split_decoder
from medsa_deploy.runtime.decoding import decode
from medsa_deploy.transforms import Frame, Prompt

from .cases import Case

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
class NetworkOutputs:
    """What a network gave for one case."""

    tensors: dict[str, Array]
    """`image_embeddings` (D, 256, g, g) of D slices, and of every pair of slice and prompt set
    `low_res_masks` (n, K, 4g, 4g) and `iou_predictions` (n, K)."""
    frame: Frame


@dataclass(frozen=True, kw_only=True)
class CaseParity:
    """How one case's outputs differ from the expected ones."""

    case: str
    tensors: dict[str, TensorParity]
    mask_pixels_differing: float
    """Share of the pixels of all the case's masks, at the image's size."""
    mask_dice: tuple[float, ...]
    """Of each mask, P·K of them."""


def reference_outputs(
    reference: Backend, manifest: Manifest, cases: Sequence[Case]
) -> list[NetworkOutputs]:
    """What the checkpoint's own network gives for the cases, through the session's own code."""
    with Session(manifest, reference) as session:
        return [run_case(session, case) for case in cases]


def run_case(session: Session, case: Case) -> NetworkOutputs:
    """Encode the case's images and decode its prompt sets, with the decoder whole."""
    return decode_case(session, case, session.encode_slices(case.images), split=False)


def decode_case(
    session: Session, case: Case, embeddings: Sequence[Embedding], *, split: bool
) -> NetworkOutputs:
    """Decode a case's prompt sets on its embeddings, with the decoder in two parts or whole."""
    if not split:
        embeddings = [replace(embedding, image_part=None) for embedding in embeddings]
    decoded = []
    for i, embedding in enumerate(embeddings):
        sets = [case.prompts[j] for slice_, j in case.pairs if slice_ == i]
        decoded.append(decode(session.backend, session.manifest, embedding, sets))
    values = [embedding.values for embedding in embeddings]
    parts = (values, *zip(*decoded, strict=True))
    return NetworkOutputs(
        tensors={name: np.concatenate(p) for name, p in zip(TENSORS, parts, strict=True)},
        frame=embeddings[0].frame,
    )


def compare_case(
    case: Case, expected: NetworkOutputs, actual: NetworkOutputs, threshold: float
) -> CaseParity:
    """Difference of two networks' outputs; `threshold` is the masks' probability."""
    cut = transforms.probability_to_logit(threshold)
    tensors = {
        name: difference(value, actual.tensors[name]) for name, value in expected.tensors.items()
    }
    masks = [
        transforms.upsample(outputs.tensors["low_res_masks"], outputs.frame) > cut
        for outputs in (expected, actual)
    ]
    return CaseParity(
        case=case.name,
        tensors=tensors,
        # of all masks together: one logit that is 0 up to rounding is 1.6e-4 of one 80×80 mask
        mask_pixels_differing=float((masks[0] != masks[1]).mean()),
        mask_dice=mask_dice(*masks),
    )


def mask_dice(expected: NDArray[np.bool_], actual: NDArray[np.bool_]) -> tuple[float, ...]:
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


class FiniteBackend:
    """A backend whose NaN and infinite values are counted, and 0 afterwards.

    A session refuses them; a comparison is to say how many there are.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name
        self._split = as_split_decoder(backend)
        self.splits = self._split is not None
        self.count = 0

    def encode(self, image: Array) -> Array:
        """See `Backend.encode`."""
        return self._finite(self.backend.encode(image))

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        masks, iou = self.backend.decode(image_embeddings, point_coords, point_labels, mask)
        return self._finite(masks), self._finite(iou)

    def decode_image(self, image_embeddings: Array) -> ImagePart:
        """See `SplitsDecoder.decode_image`."""
        assert self._split is not None
        return self._split.decode_image(image_embeddings)

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`."""
        assert self._split is not None
        masks, iou = self._split.decode_click(image_part, point_coords, point_labels)
        return self._finite(masks), self._finite(iou)

    def facts(self) -> dict[str, Any]:
        """See `Backend.facts`."""
        return self.backend.facts()

    def close(self) -> None:
        """See `Backend.close`."""
        self.backend.close()

    def _finite(self, values: Array) -> Array:
        wrong = ~np.isfinite(values)
        self.count += int(wrong.sum())
        return np.where(wrong, np.float32(0), values)


@dataclass(frozen=True, kw_only=True)
class BundleParity:
    """Comparisons of all cases, in their order."""

    comparisons: list[CaseParity]
    nan_count: int
    """Values that were NaN or infinite."""
    split: BundleParity | None
    """The same with the decoder in two parts, where the backend has them."""
    encoders: dict[str, BundleParity] = field(default_factory=dict)
    """The same with a backend's own encoder, by role, where the bundle has it."""

    def summary(self, cases: Sequence[Case], *, precision: str, backend: str) -> Parity:
        """The worst of all cases, as the manifest records it."""

        def nested(other: BundleParity) -> Parity:
            return other.summary(cases, precision=precision, backend=backend)

        return summarise(
            cases,
            self.comparisons,
            precision=precision,
            backend=backend,
            nan_count=self.nan_count,
            split=None if self.split is None else nested(self.split),
            encoders={role: nested(other) for role, other in self.encoders.items()},
        )


def compare_cases(
    session: Session, cases: Sequence[Case], expected: Iterable[dict[str, Array]]
) -> BundleParity:
    """Compare every case, encoded once, with each form of the decoder that the backend has."""
    backend = FiniteBackend(session.backend)
    counting = Session(session.manifest, backend)
    threshold = session.conventions.threshold
    forms = (False, True) if backend.splits else (False,)
    found: dict[bool, list[CaseParity]] = {split: [] for split in forms}
    wrong = dict.fromkeys(forms, 0)
    for case, tensors in zip(cases, expected, strict=True):
        embeddings = counting.encode_slices(case.images)
        for split in forms:
            actual = decode_case(counting, case, embeddings, split=split)
            wanted = NetworkOutputs(tensors=tensors, frame=actual.frame)
            found[split].append(compare_case(case, wanted, actual, threshold))
            wrong[split] += backend.count
            backend.count = 0
    compared = None
    for split in reversed(forms):
        compared = BundleParity(comparisons=found[split], nan_count=wrong[split], split=compared)
    assert compared is not None
    return compared


def summarise(
    cases: Sequence[Case],
    comparisons: Iterable[CaseParity],
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


def parity_failures(parity: Parity, limits: Limits | None = None) -> list[str]:
    """What exceeds the limits, by default the precision's, in words; empty when the proof holds."""
    limits = limits or limits_of(parity.precision)
    found = _failures(parity, limits)
    others = {"decoder in two parts": parity.split, **parity.encoders}
    for form, other in others.items():
        if other is not None:
            found += [f"{form}: {problem}" for problem in parity_failures(other, limits)]
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


def require_parity(parity: Parity) -> None:
    """ParityError when the graphs are not the checkpoint's network."""
    if problems := parity_failures(parity):
        raise ParityError(
            f"the {parity.precision} graphs in {parity.backend} are not the checkpoint's network: "
            + "; ".join(problems)
        )


def save_reference(path: Path, case: Case, outputs: NetworkOutputs) -> None:
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
