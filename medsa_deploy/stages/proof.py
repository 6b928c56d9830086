"""What export and verify share: the cases of a proof, the checkpoint's outputs, the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsa_deploy import verify
from medsa_deploy.images import Image, find_images, is_volume, read_image
from medsa_deploy.manifest import Manifest, Network, Parity
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backend import Backend, ImagePart, splitting
from medsa_deploy.verify import Array, Case, Comparison, Outputs

if TYPE_CHECKING:
    from medsa_deploy.exporters.reference import ReferenceNetwork

SEEDS = (1, 2)
"""Seeded images of every proof, besides the user's own."""

Progress = Callable[[str], None]
"""Called with the name of a step when it begins."""


def cases(network: Network, images: Path | None) -> list[Case]:
    """Seeded cases, then one for each of the user's images: a file, or a folder of them.

    For a network that sees depth these are volumes, each with a chunk from its middle.
    """
    side, chunk = network.mask_prompt_size, network.chunk
    made = [verify.seeded_case(network.image_size, side, seed, chunk) for seed in SEEDS]
    return made + [verify.image_case(name, found, side) for name, found in _users(images, chunk)]


def _users(path: Path | None, chunk: int) -> Iterator[tuple[str, list[Image]]]:
    """The user's images, or chunks of slices, each with its name."""
    if path is None:
        return
    one = not path.is_dir() or (chunk > 1 and is_volume(path))
    for file in [path] if one else find_images(path):
        yield file.name, [read_image(file)] if chunk == 1 else verify.middle_slices(file, chunk)


def reference_outputs(
    reference: ReferenceNetwork, made: Manifest, cases: Sequence[Case]
) -> list[Outputs]:
    """What the checkpoint's own network gives for the cases, through the session's own code."""
    from medsa_deploy.exporters.reference import ReferenceBackend

    with Session(made, ReferenceBackend(reference)) as session:
        return [verify.run_case(session, case) for case in cases]


class FiniteBackend:
    """A backend whose NaN and infinite values are counted, and 0 afterwards.

    A session refuses them; a comparison is to say how many there are.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name
        self._split = splitting(backend)
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
class Compared:
    """Comparisons of all cases, in their order."""

    comparisons: list[Comparison]
    nan_count: int
    """Values that were NaN or infinite."""
    split: Compared | None
    """The same with the decoder in two parts, where the backend has them."""
    encoders: dict[str, Compared] = field(default_factory=dict)
    """The same with a backend's own encoder, by role, where the bundle has it."""

    def summary(self, cases: Sequence[Case], *, precision: str, backend: str) -> Parity:
        """The worst of all cases, as the manifest records it."""

        def nested(other: Compared) -> Parity:
            return other.summary(cases, precision=precision, backend=backend)

        return verify.summarise(
            cases,
            self.comparisons,
            precision=precision,
            backend=backend,
            nan_count=self.nan_count,
            split=None if self.split is None else nested(self.split),
            encoders={role: nested(other) for role, other in self.encoders.items()},
        )


def compare_all(
    session: Session, cases: Sequence[Case], expected: Iterable[dict[str, Array]]
) -> Compared:
    """Compare every case, encoded once, with each form of the decoder that the backend has."""
    backend = FiniteBackend(session.backend)
    counting = Session(session.manifest, backend)
    threshold = session.conventions.threshold
    forms = (False, True) if backend.splits else (False,)
    found: dict[bool, list[Comparison]] = {split: [] for split in forms}
    wrong = dict.fromkeys(forms, 0)
    for case, tensors in zip(cases, expected, strict=True):
        embeddings = counting.encode_slices(case.images)
        for split in forms:
            actual = verify.decode_case(counting, case, embeddings, split=split)
            wanted = Outputs(tensors=tensors, frame=actual.frame)
            found[split].append(verify.compare(case, wanted, actual, threshold))
            wrong[split] += backend.count
            backend.count = 0
    compared = None
    for split in reversed(forms):
        compared = Compared(comparisons=found[split], nan_count=wrong[split], split=compared)
    assert compared is not None
    return compared
