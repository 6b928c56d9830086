"""A volume and prompts in its voxels → a label map, slice by slice.

Only chunks that a prompt asks for, or a mask is followed into, are encoded. Of each slice no more
than low-resolution logits are kept, until they are merged into the label map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.images.volume import Volume
from medsa_deploy.transforms import Frame, Prompt

from .backend import Array
from .chunks import ChunkEncoder
from .session import Embedding, Session, decode
from .structures import (
    Labelling,
    SlicePrompts,
    Structure,
    check_foreground,
    labelling,
    shared_prompt,
    slice_prompts,
)

MARGIN = 3.0
"""Pixels by which the box of a mask is enlarged to prompt the next slice."""

Logits = dict[int, Array]
"""Slice → (K, 4g, 4g) float32, of one structure."""


@dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """How a volume is segmented."""

    intensity_window: tuple[float, float] | None = None
    """Intensities of black and white; None: the bundle's, or the file's."""
    threshold: float | None = None
    """Probability above which a voxel belongs to a mask; None: the bundle's."""
    overlap: int = 0
    """Slices that neighbouring chunks of a 3D network share; their logits are blended."""
    propagate: bool = False
    """Follow each mask into the slices beyond the prompts, until it is empty."""
    margin: float = MARGIN


@dataclass(frozen=True, kw_only=True, eq=False)
class VolumePrediction:
    """What came of a volume."""

    labels: NDArray[np.uint8]
    """(X, Y, Z) in the volume's stored order: 0 background, else a number from 1."""
    names: tuple[str, ...]
    """What label k is called: `names[k − 1]`."""
    slices: tuple[int, ...]
    """Slices that were segmented, in order; all others are background."""
    intensity_window: tuple[float, float] | None
    timings_ms: dict[str, float]
    """Medians of a slice: `encode`, preprocessing included, and `decode`, all its structures."""


def segment_volume(
    session: Session,
    volume: Volume,
    structures: Sequence[Structure],
    options: VolumeOptions | None = None,
    *,
    on_slice: Callable[[int, int], None] = lambda done, total: None,
) -> VolumePrediction:
    """Segment the slices that prompts are for and, with `propagate`, those their masks reach.

    Where labels overlap, a voxel belongs to the one with the highest logit. `on_slice` is told how
    many slices are encoded, and how many will be at most. PromptError for prompts that cannot be
    used, ImageError for a volume that cannot be.
    """
    options = options or VolumeOptions()
    labels_of = labelling(structures, session.manifest)
    prompts = [slice_prompts(one, volume) for one in structures]
    total = len(volume)
    encoder = ChunkEncoder(
        session,
        volume,
        overlap=options.overlap,
        intensity_window=options.intensity_window,
        on_slice=lambda done: on_slice(done, total),
    )
    given = options.threshold
    threshold = session.conventions.threshold if given is None else given
    run = _Run(session, encoder, labels_of, transforms.probability_to_logit(threshold))
    work = _prompted(prompts, encoder, session)
    if not options.propagate:
        total = len(set().union(*(encoder.slices(start) for start in work)))
    logits = run.segment(work)
    if options.propagate:
        run.propagate(logits, options.margin)
    labels = np.zeros(volume.shape, np.uint8)
    slices = sorted(set().union(*logits))
    for index in slices:
        volume.plane(labels, index)[...] = run.merged([one.pop(index, None) for one in logits])
    return VolumePrediction(
        labels=labels,
        names=labels_of.names,
        slices=tuple(slices),
        intensity_window=encoder.window,
        timings_ms={"encode": encoder.encode_ms, "decode": median(run.decode_ms)},
    )


Work = dict[int, dict[int, dict[int, Prompt]]]
"""Chunk → slice → structure → its prompt set."""


def _prompted(prompts: Sequence[SlicePrompts], encoder: ChunkEncoder, session: Session) -> Work:
    """What the prompts ask for, chunk by chunk.

    A set for the whole chunk segments all of its slices; where a structure has boxes, no slice
    beyond them.
    """
    whole = encoder.size > 1 and session.conventions.prompt_scope == "chunk"
    work: Work = defaultdict(lambda: defaultdict(dict))
    for start in encoder.starts:
        slices = sorted(encoder.slices(start))
        for structure, of_slices in enumerate(prompts):
            here = {index: of_slices[index] for index in slices if index in of_slices}
            if whole and here:
                boxed = any(prompt.box is not None for prompt in of_slices.values())
                shared = shared_prompt(here.values())
                check_foreground(shared, f"the chunk of slices {slices[0]}…{slices[-1]}")
                here = dict.fromkeys(here if boxed else slices, shared)
            for index, prompt in here.items():
                check_foreground(prompt, f"slice {index}")
                work[start][index][structure] = prompt
    return work


class _Run:
    """Decoding the slices of one volume."""

    def __init__(
        self, session: Session, encoder: ChunkEncoder, labels: Labelling, cut: float
    ) -> None:
        self.session = session
        self.encoder = encoder
        self.labels = labels
        self.cut = cut
        """The logit above which a pixel belongs to a mask."""
        self.decode_ms: list[float] = []
        self.frame: Frame | None = None

    def segment(self, work: Work) -> list[Logits]:
        """Every structure's logits where prompts ask for them, blended where chunks overlap."""
        found: list[Logits] = [{} for _ in self.labels.channels]
        weights: dict[tuple[int, int], float] = defaultdict(float)
        for start, slices in work.items():
            embeddings = self.encoder.chunk(start)
            for index, sets in slices.items():
                weight = self.encoder.weight(start, index)
                decoded = self._decode(embeddings[index - start], list(sets.values()))
                for structure, logits in zip(sets, decoded, strict=True):
                    total = weights[structure, index] = weights[structure, index] + weight
                    before = found[structure].get(index, logits)
                    found[structure][index] = before + (logits - before) * (weight / total)
        return found

    def propagate(self, logits: list[Logits], margin: float) -> None:
        """Follow each structure upwards and downwards from the slices in `logits`, and add to them.

        The next slice is prompted by the box of the mask before it. A slice that is reached from
        both sides gets the mean of the two.
        """
        indices = range(len(self.encoder))
        up, down = (self._followed(logits, order, margin) for order in (indices, indices[::-1]))
        for structure, of_slices in enumerate(logits):
            for index in up[structure].keys() | down[structure].keys():
                both = [one[structure][index] for one in (up, down) if index in one[structure]]
                of_slices[index] = np.mean(both, axis=0, dtype=np.float32)

    def _followed(
        self, prompted: list[Logits], order: Sequence[int], margin: float
    ) -> list[Logits]:
        """The slices that structures are followed into, in one direction."""
        found: list[Logits] = [{} for _ in prompted]
        boxes: list[Array | None] = [None] * len(prompted)
        for index in order:
            for structure, of_slices in enumerate(prompted):
                if index in of_slices:
                    boxes[structure] = self._box(of_slices[index], structure, margin)
            sets = {
                structure: _box_prompt(box)
                for structure, box in enumerate(boxes)
                if box is not None and index not in prompted[structure]
            }
            if not sets:
                continue
            work = {start: {index: sets} for start in self.encoder.holding(index)}
            for structure, of_slices in enumerate(self.segment(work)):
                if index in of_slices:
                    found[structure] |= of_slices
                    boxes[structure] = self._box(of_slices[index], structure, margin)
        return found

    def merged(self, logits: Sequence[Array | None]) -> NDArray[np.uint8]:
        """One slice's logits of every structure → its labels (H, W); the highest logit wins."""
        best: dict[int, Array] = {}
        for of_structure, channels in zip(logits, self.labels.channels, strict=True):
            if of_structure is None:
                continue
            for channel, label in channels:
                candidate = of_structure[channel]
                best[label] = np.maximum(best.get(label, candidate), candidate)
        assert self.frame is not None
        winners = transforms.label_map(
            transforms.upsample(np.stack(list(best.values())), self.frame), self.cut
        )
        return np.array([0, *best], np.uint8)[winners]

    def _decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> Array:
        """Logits of prompt sets on one slice: (P, K, 4g, 4g)."""
        start = perf_counter()
        logits, _ = decode(self.session.backend, self.session.manifest, embedding, prompts)
        self.decode_ms.append(1e3 * (perf_counter() - start))
        self.frame = embedding.frame
        return logits

    def _box(self, logits: Array, structure: int, margin: float) -> Array | None:
        """The box around a structure's masks on a slice, enlarged; None if they are empty."""
        assert self.frame is not None
        wanted = [channel for channel, _ in self.labels.channels[structure]]
        inside = transforms.upsample(logits[wanted], self.frame) > self.cut
        rows, columns = (np.flatnonzero(inside.any(axis=axes)) for axes in ((0, 2), (0, 1)))
        if not len(rows):
            return None
        height, width = inside.shape[1:]
        low = np.maximum([columns[0] - margin, rows[0] - margin], 0)
        high = np.minimum([columns[-1] + 1 + margin, rows[-1] + 1 + margin], [width, height])
        return np.concatenate([low, high]).astype(np.float32)


def _box_prompt(box: Array) -> Prompt:
    """A prompt set of nothing but a box."""
    none = np.zeros((0, 2), np.float32)
    return Prompt(points=none, labels=none[:, 0], box=box, mask=None)
