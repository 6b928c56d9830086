"""Where the chunks of slices come from: the MNI T1 template's slices, and phantoms; their splits.

The template (MNI ICBM152 2009a, in the wheel nilearn) is one average head, so what is held out are
contiguous blocks of its axial slices, with a gap on either side. Phantoms are split by seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from medsa_deploy.transforms import Frame, preprocess

from .network import CHUNK, CLASSES, SIZE
from .phantoms import Phantom, Style, phantom

TEMPLATE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
LABEL_THRESHOLD = 128
"""Tissue maps hold probabilities 0…255."""
SLICES = range(28, 148)
"""Axial slices with enough brain in them."""
TEST_BLOCKS = (range(44, 52), range(88, 96), range(114, 122))
VALIDATION_BLOCKS = (range(66, 74),)
GAP = 2
"""Slices on either side of a held-out block that nothing is trained on either."""
STYLES: tuple[Style, Style] = ("ultrasound", "ct")
"""Phantoms of the class `phantom`; the base also sees folded ones."""
SMALLEST = 150
"""Pixels of the smallest structure that is prompted; in a chunk, on average of its slices."""
TRAIN, VALIDATION, TEST = 0, 1, 2
"""First number of a phantom's seed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """CHUNK slices as the network takes them, and the structures in them."""

    image: NDArray[np.float32]
    """(D, S, S) 0…1: what `preprocess` makes of the slices, one channel of three equal ones."""
    frame: Frame
    structures: dict[str, NDArray[np.bool_]]
    """(D, H, W) in the slices' own pixels, by class; a class that is not named is empty. Of a
    phantom only the structure that is asked for."""


def train_windows() -> list[range]:
    """Every run of CHUNK slices that keeps GAP away from all held-out blocks."""
    held_out = {
        z for block in TEST_BLOCKS + VALIDATION_BLOCKS
        for z in range(block.start - GAP, block.stop + GAP)
    }  # fmt: skip
    starts = range(SLICES.start, SLICES.stop - CHUNK + 1)
    windows = [range(start, start + CHUNK) for start in starts]
    return [window for window in windows if held_out.isdisjoint(window)]


class Template:
    """The template's axial slices, read once: grey values and tissue maps, as stored (H, W)."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nilearn")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "nilearn, which carries the MNI template, is missing: install '.[dev]'"
            )
        folder = Path(spec.submodule_search_locations[0])
        volumes = {
            kind: np.asarray(nibabel.load(folder / TEMPLATE.format(kind)).dataobj)
            for kind in ("t1", "wm", "gm")
        }
        self._planes = {
            kind: {z: volume[:, :, z] for z in SLICES} for kind, volume in volumes.items()
        }

    def network_frame_of(self, slices: Sequence[int]) -> NDArray[np.float32]:
        """(3, D, S, S) 0…1: T1, white and grey matter's probability, stretched to the frame."""
        return np.stack(
            [
                [preprocess(planes[z], "medsa", SIZE)[0][0] for z in slices]
                for planes in self._planes.values()
            ]
        )

    def tissues_of(self, z: int) -> NDArray[np.float32]:
        """(4, S, S) 0…1: T1 as SAMed prepares it; white and grey matter's probability, and where
        the template is not black."""
        planes = {kind: planes[z] for kind, planes in self._planes.items()}
        drawn = np.where(planes["t1"] > 0, np.uint8(255), np.uint8(0))
        maps = (planes["wm"], planes["gm"], drawn)
        return np.stack(
            [
                preprocess(planes["t1"], "samed", SIZE)[0][0],
                *(preprocess(plane, "medsa", SIZE)[0][0] for plane in maps),
            ]
        )

    def labels(self, z: int) -> NDArray[np.uint8]:
        """(H, W) of a slice: 1 white matter, 2 grey matter, 3 the rest that is not black."""
        planes = {kind: planes[z] for kind, planes in self._planes.items()}
        return tissue_labels(
            planes["wm"] >= LABEL_THRESHOLD, planes["gm"] >= LABEL_THRESHOLD, planes["t1"] > 0
        )

    def plane(self, z: int) -> NDArray[np.uint8]:
        """(H, W) grey values of a slice."""
        return self._planes["t1"][z]

    def chunk(self, window: range) -> Chunk:
        """The slices of `window` with white matter, grey matter and both."""
        white, grey = (
            np.stack([self._planes[kind][z] for z in window]) >= LABEL_THRESHOLD
            for kind in ("wm", "gm")
        )
        prepared = [preprocess(self._planes["t1"][z], "medsa", SIZE) for z in window]
        structures = dict(zip(CLASSES, (white, grey, white | grey), strict=False))
        return Chunk(
            image=np.stack([image[0] for image, _ in prepared]),
            frame=prepared[0][1],
            structures=structures,
        )


def tissue_labels(
    white: NDArray[np.bool_], grey: NDArray[np.bool_], drawn: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Masks of one shape → 1 white matter, 2 grey matter, 3 the rest that is drawn, 0 elsewhere."""
    labels = np.where(drawn, np.uint8(3), np.uint8(0))
    labels[grey] = 2
    labels[white] = 1
    return labels


def phantom_of(seed: tuple[int, ...]) -> Phantom:
    """A phantom of CHUNK slices that has a structure large enough to be asked for."""
    for attempt in range(100):
        style = STYLES[(seed[-1] + attempt) % len(STYLES)]
        candidate = phantom((*seed, attempt), style, depth=CHUNK)
        if structures_of(candidate.labels, pixels=SMALLEST * CHUNK):
            return candidate
    raise AssertionError(f"no phantom of the seed {seed} has a structure large enough")


def phantom_chunk(seed: tuple[int, ...]) -> Chunk:
    """A phantom of CHUNK slices, and one of its structures that is large enough."""
    drawn = phantom_of(seed)
    structures = structures_of(drawn.labels, pixels=SMALLEST * CHUNK)
    prepared = [preprocess(plane, "medsa", SIZE) for plane in drawn.pixels]
    return Chunk(
        image=np.stack([image[0] for image, _ in prepared]),
        frame=prepared[0][1],
        structures={CLASSES[-1]: drawn.labels == structures[seed[-1] % len(structures)]},
    )


def structures_of(labels: NDArray[np.uint8], *, pixels: int) -> list[int]:
    """The structures, 1…, of at least `pixels` pixels."""
    counts = np.bincount(labels.ravel())
    return [k for k in range(1, len(counts)) if counts[k] >= pixels]
