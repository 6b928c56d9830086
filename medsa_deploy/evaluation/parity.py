"""Outputs of two networks on the same cases → how much they differ, and whether that is too much.

A case is an image with prompt sets. The checkpoint's own network and a bundle's graphs run the same
cases through the same session code, so that every difference comes from the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest, Parity, TensorParity
from medsa_deploy.errors import ParityError
from medsa_deploy.runtime import Embedding, Session
from medsa_deploy.runtime.backends.interface import (
    Backend,
    HostOrDevice,
    ImagePart,
    as_split_decoder,
)
from medsa_deploy.transforms import Frame, MaskRule

from .cases import Case
from .metrics import dice

Array = NDArray[np.float32]

RELATIVE_L2_LIMIT = 1e-4
"""Above this, an exported float32 graph is not the checkpoint's network."""
MASK_PIXELS_LIMIT = 1e-4
"""Largest share of a case's mask pixels that may differ."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a precision may differ; None means that a figure has no limit."""

    relative_l2: float | None = None
    mask_pixels: float | None = None
    dice_mean: float | None = None
    dice_worst: float | None = None


DICE_TOLERANCE = 0.02
"""How far mean mask Dice may fall below that of another machine: INT8 kernels round differently,
and the saved reference's masks are of noise."""

FLOAT32_LIMITS = Limits(relative_l2=RELATIVE_L2_LIMIT, mask_pixels=MASK_PIXELS_LIMIT)
LIMITS = {
    "fp16": Limits(dice_mean=0.995, dice_worst=0.98),
    "bf16": Limits(dice_mean=0.995, dice_worst=0.98),
    "int8": Limits(dice_mean=0.99),
    "int8-cpu": Limits(dice_mean=0.99),
    "int8-bf16": Limits(dice_mean=0.99),
}
"""Limits by precision; a precision that is not listed has float32's."""

TENSORS = ("image_embeddings", "low_res_masks", "iou_predictions")
"""The tensors that are compared, in the order they are computed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkOutputs:
    """A network's outputs for one case."""

    tensors: dict[str, Array]
    """`image_embeddings` (D, 256, g, g) of D slices; and for n pairs of slice and prompt set
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
    """Dice of each mask, P·K of them."""


def reference_outputs(
    reference: Backend, manifest: Manifest, cases: Sequence[Case]
) -> list[NetworkOutputs]:
    """Run the checkpoint's own network on the cases, through the same session code as a bundle."""
    with Session(manifest, reference) as session:
        return [run_case(session, case) for case in cases]


def run_case(session: Session, case: Case) -> NetworkOutputs:
    """Encode a case's images and decode its prompt sets with the whole decoder."""
    return decode_case(session, case, session.encode_slices(case.images), split=False)


def decode_case(
    session: Session, case: Case, embeddings: Sequence[Embedding], *, split: bool
) -> NetworkOutputs:
    """Decode a case's prompt sets on its embeddings, with the split or the whole decoder."""
    if not split:
        embeddings = [replace(embedding, image_part=None) for embedding in embeddings]
    decoded = []
    for i, embedding in enumerate(embeddings):
        sets = [case.prompts[j] for slice_, j in case.pairs if slice_ == i]
        decoded.append(session.decode_logits(embedding, sets))
    values = [embedding.values for embedding in embeddings]
    parts = (values, *zip(*decoded, strict=True))
    return NetworkOutputs(
        tensors={name: np.concatenate(p) for name, p in zip(TENSORS, parts, strict=True)},
        frame=embeddings[0].frame,
    )


def compare_case(
    case: Case, expected: NetworkOutputs, actual: NetworkOutputs, rule: MaskRule
) -> CaseParity:
    """Compare two networks' outputs, and the masks that they become by one rule."""
    tensors = {
        name: difference(value, actual.tensors[name]) for name, value in expected.tensors.items()
    }
    masks = [
        np.stack(
            [
                transforms.image_masks(of_set, outputs.frame, rule)
                for of_set in outputs.tensors["low_res_masks"]
            ]
        )
        for outputs in (expected, actual)
    ]
    return CaseParity(
        case=case.name,
        tensors=tensors,
        # over all masks together: one logit near the threshold is 1.6e-4 of a single 80×80 mask
        mask_pixels_differing=float((masks[0] != masks[1]).mean()),
        mask_dice=tuple(
            dice(a, b)
            for sets in zip(*masks, strict=True)  # (n, K, H, W): a prompt set, then its masks
            for a, b in zip(*sets, strict=True)
        ),
    )


def difference(expected: Array, actual: Array) -> TensorParity:
    """Relative L2 ‖a − e‖ / ‖e‖ and largest absolute difference; ParityError if shapes differ."""
    if expected.shape != actual.shape:
        raise ParityError(
            f"the networks give different shapes: found {actual.shape}, expected {expected.shape}"
        )
    e, a = expected.astype(np.float64), actual.astype(np.float64)
    return TensorParity(
        relative_l2=float(np.linalg.norm(a - e)) / max(float(np.linalg.norm(e)), 1e-30),
        max_abs=float(np.abs(a - e).max()),
    )


class FiniteBackend:
    """A backend whose NaN and infinite values are counted and replaced with 0.

    A session refuses such values, but a comparison reports how many there are.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name
        self._split = as_split_decoder(backend)
        self.splits = self._split is not None
        self.count = 0
        """Values replaced since it was last set to 0."""

    def encode(self, image: Array) -> Array:
        """See `Backend.encode`."""
        return self._finite(self.backend.encode(image))

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        masks, iou = self.backend.decode(image_embeddings, point_coords, point_labels, mask)
        return self._finite(masks), self._finite(iou)

    def decode_image(self, image_embeddings: Any) -> ImagePart:
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

    def _finite(self, outputs: HostOrDevice) -> Array:
        values = np.asarray(outputs)
        not_finite = ~np.isfinite(values)
        self.count += int(not_finite.sum())
        return np.where(not_finite, np.float32(0), values)


@dataclass(frozen=True, kw_only=True)
class BundleParity:
    """Comparisons of all cases, in the order of the cases."""

    comparisons: list[CaseParity]
    nan_count: int
    """Values that were NaN or infinite."""
    split: BundleParity | None
    """The same comparisons with the split decoder; None if the backend has none."""
    encoders: dict[str, BundleParity] = field(default_factory=dict)
    """The same comparisons with each backend's own encoder in the bundle, by role."""

    def summary(self, cases: Sequence[Case], *, precision: str, backend: str) -> Parity:
        """The worst figures of all cases, as the manifest records them."""

        def nested(parity: BundleParity) -> Parity:
            return parity.summary(cases, precision=precision, backend=backend)

        return summarise(
            cases,
            self.comparisons,
            precision=precision,
            backend=backend,
            nan_count=self.nan_count,
            split=None if self.split is None else nested(self.split),
            encoders={role: nested(parity) for role, parity in self.encoders.items()},
        )


def compare_cases(
    session: Session, cases: Sequence[Case], expected: Iterable[dict[str, Array]]
) -> BundleParity:
    """Compare every case, encoded once, with each form of the decoder that the backend has."""
    backend = FiniteBackend(session.backend)
    finite_session = Session(session.manifest, backend)
    rule = transforms.mask_rule(session.manifest)
    forms = (False, True) if backend.splits else (False,)
    comparisons: dict[bool, list[CaseParity]] = {split: [] for split in forms}
    nan_counts = dict.fromkeys(forms, 0)
    for case, tensors in zip(cases, expected, strict=True):
        embeddings = finite_session.encode_slices(case.images)
        for split in forms:
            actual = decode_case(finite_session, case, embeddings, split=split)
            reference = NetworkOutputs(tensors=tensors, frame=actual.frame)
            comparisons[split].append(compare_case(case, reference, actual, rule))
            nan_counts[split] += backend.count
            backend.count = 0
    parity = None
    for split in reversed(forms):
        parity = BundleParity(
            comparisons=comparisons[split], nan_count=nan_counts[split], split=parity
        )
    assert parity is not None
    return parity


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
    """The worst figures of all cases, as the manifest records them.

    `nan_count`: NaN and infinite values, which were compared as 0. `split`: the same comparison
    with the split decoder. `encoders`: the same with each backend's own encoder, by role.
    """
    comparisons = list(comparisons)
    return Parity(
        precision=precision,
        backend=backend,
        images=sum(not case.seeded for case in cases),
        seeded_images=sum(case.seeded for case in cases),
        prompt_sets=sum(len(case.prompts) for case in cases),
        tensors={
            name: TensorParity(
                relative_l2=max(c.tensors[name].relative_l2 for c in comparisons),
                max_abs=max(c.tensors[name].max_abs for c in comparisons),
            )
            for name in comparisons[0].tensors
        },
        mask_pixels_differing=max(c.mask_pixels_differing for c in comparisons),
        mask_dice_mean=float(np.mean([value for c in comparisons for value in c.mask_dice])),
        mask_dice_worst=min(min(c.mask_dice) for c in comparisons),
        nan_count=nan_count,
        split=split,
        encoders=dict(encoders or {}),
    )


def limits_of(precision: str, recorded_dice: float | None = None) -> Limits:
    """The limits of a precision.

    `recorded_dice`: mean mask Dice of an earlier run on the same cases; it takes the place of the
    precision's limits.
    """
    if recorded_dice is not None:
        return Limits(dice_mean=recorded_dice - DICE_TOLERANCE)
    return LIMITS.get(precision, FLOAT32_LIMITS)


def parity_failures(parity: Parity, limits: Limits | None = None) -> list[str]:
    """The figures that exceed the limits, in words; empty if all are within them.

    `limits`: the precision's by default.
    """
    limits = limits or limits_of(parity.precision)
    failures = _failures(parity, limits)
    for form, nested in {"decoder in two parts": parity.split, **parity.encoders}.items():
        if nested is not None:
            failures += [f"{form}: {failure}" for failure in parity_failures(nested, limits)]
    return failures


def _failures(parity: Parity, limits: Limits) -> list[str]:
    failures = [f"{parity.nan_count} values are NaN or infinite"] if parity.nan_count else []
    if limits.relative_l2 is not None:
        failures += [
            f"{name}: relative L2 {tensor.relative_l2:.1e} > {limits.relative_l2:.0e}"
            for name, tensor in parity.tensors.items()
            if not tensor.relative_l2 <= limits.relative_l2
        ]
    if limits.mask_pixels is not None and not parity.mask_pixels_differing <= limits.mask_pixels:
        share = parity.mask_pixels_differing
        failures.append(f"{share:.1e} of mask pixels differ > {limits.mask_pixels:.0e}")
    for word, value, limit in (
        ("mean", parity.mask_dice_mean, limits.dice_mean),
        ("worst", parity.mask_dice_worst, limits.dice_worst),
    ):
        if limit is not None and not (value is not None and value >= limit):
            failures.append(
                f"{word} mask Dice {value if value is None else f'{value:.4f}'} < {limit:.4g}"
            )
    return failures


def require_parity(parity: Parity) -> None:
    """ParityError if the graphs exceed the limits of their precision."""
    if failures := parity_failures(parity):
        raise ParityError(
            f"the {parity.precision} graphs in {parity.backend} are not the checkpoint's network: "
            + "; ".join(failures)
        )
