"""A volume and prompts in its voxels → a label map, slice by slice.

Only chunks that a prompt asks for, or a mask is followed into, are encoded. A slice's logits go
into the label map as soon as all chunks that hold it are decoded; only where masks may meet from
two prompts are they kept longer, at low resolution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.images.volume import Volume
from medsa_deploy.runtime.backends.interface import Array
from medsa_deploy.runtime.decoding import SETS_AT_ONCE, decode
from medsa_deploy.runtime.session import Session
from medsa_deploy.transforms import Frame, Prompt

from .chunk_encoder import ChunkEncoder
from .label_map import LabelMap
from .structures import (
    Labelling,
    SlicePrompts,
    Structure,
    check_foreground,
    has_foreground,
    labelling,
    shared_prompt,
    slice_prompts,
)

MARGIN = 3.0
"""Pixels by which the box of a mask is enlarged to prompt the next slice."""
KEPT_BYTES = 256 * 2**20
"""Of logits between the prompts of structures that are followed together."""

Work = dict[int, dict[int, dict[int, Prompt]]]
"""Chunk → slice → structure → its prompt set."""
Boxes = dict[int, Array | None]
"""Slice → the box around a structure's mask there, None where it is empty."""


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
    margin: float | None = None
    """Pixels by which the box of a mask that is followed is enlarged on every side; None: 3."""


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
    degraded: str | None = None
    """Why another backend than the one asked for made some of it, where a fallback did."""


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
    margin = _margin(options)
    given = options.threshold
    cut = transforms.probability_to_logit(session.conventions.threshold if given is None else given)
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
    work = _prompted(prompts, encoder, session)
    label_map = LabelMap(volume, cut, revisited=len(structures) > 1)
    run = _Run(session, encoder, labels_of, label_map, cut)
    if options.propagate:
        run.propagate(work, margin)
    else:
        total = len(set().union(*(encoder.slices(start) for start in work)))
        run.segment(work)
    return VolumePrediction(
        labels=label_map.labels,
        names=labels_of.names,
        slices=tuple(sorted(run.decode_ms)),
        intensity_window=encoder.window,
        timings_ms={"encode": encoder.encode_ms, "decode": median(run.decode_ms.values())},
        degraded=session.degraded,
    )


def _margin(options: VolumeOptions) -> float:
    """The margin that is meant; UsageError for one that cannot be used."""
    if options.margin is None:
        return MARGIN
    if not options.propagate:
        raise UsageError("a margin is for masks that are followed: add --propagate, or omit it")
    if not 0 <= options.margin < inf:
        raise UsageError(f"a margin of {options.margin:g} pixels cannot be used: give 0 or more")
    return options.margin


def _prompted(prompts: Sequence[SlicePrompts], encoder: ChunkEncoder, session: Session) -> Work:
    """What the prompts ask for, chunk by chunk.

    A set for the whole chunk segments all of its slices; where a structure has boxes, no slice
    beyond them. Where chunks overlap, background clicks alone are left to the chunk that has the
    foreground, too.
    """
    whole = encoder.size > 1 and session.conventions.prompt_scope == "chunk"
    work: Work = defaultdict(lambda: defaultdict(dict))
    wanted = [
        {start for i in of_slices if has_foreground(of_slices[i]) for start in encoder.holding(i)}
        for of_slices in prompts
    ]
    for start in encoder.starts:
        slices = sorted(encoder.slices(start))
        for structure, of_slices in enumerate(prompts):
            here = {index: of_slices[index] for index in slices if index in of_slices}
            if whole and here:
                if start not in wanted[structure] and all(
                    wanted[structure] & set(encoder.holding(index)) for index in here
                ):
                    continue
                boxed = any(prompt.box is not None for prompt in of_slices.values())
                shared = shared_prompt(here.values())
                check_foreground(shared, f"the chunk of slices {slices[0]}…{slices[-1]}")
                here = dict.fromkeys(here if boxed else slices, shared)
            for index, prompt in here.items():
                check_foreground(prompt, f"slice {index}")
                work[start][index][structure] = prompt
    return work


class _Run:
    """Decoding the slices of one volume into its label map."""

    def __init__(
        self,
        session: Session,
        encoder: ChunkEncoder,
        labelling: Labelling,
        label_map: LabelMap,
        cut: float,
    ) -> None:
        self.session = session
        self.encoder = encoder
        self.label_map = label_map
        self.masks = [[mask for mask, _ in channels] for channels in labelling.channels]
        """For each structure, the decoder's masks that are wanted of it."""
        self.labels = [[label for _, label in channels] for channels in labelling.channels]
        """And the labels they become."""
        self.cut = cut
        """The logit above which a pixel belongs to a mask."""
        self.decode_ms: dict[int, float] = defaultdict(float)
        """Of every slice that was segmented."""
        self.frame: Frame | None = None

    def segment(self, work: Work) -> None:
        """Segment what the prompts ask for."""
        for index, structure, logits in self._decoded(work):
            self._label(index, structure, self._pixels(logits))

    def propagate(self, work: Work, margin: float) -> None:
        """Segment what the prompts ask for, and follow structures upwards and downwards from it.

        The next slice is prompted by the box of the mask before it. A slice that is reached from
        both sides gets the mean of the two.
        """
        prompted: list[Boxes] = [{} for _ in self.masks]
        for index, structure, logits in self._decoded(work):
            pixels = self._pixels(logits)
            prompted[structure][index] = _box(pixels > self.cut, margin)
            self._label(index, structure, pixels)
        for some in self._few(prompted):
            self._follow(some, margin)

    def _few(self, prompted: Sequence[Boxes]) -> Iterator[Sequence[Boxes]]:
        """The structures' boxes, those of a few structures at a time.

        Between two prompts a structure's logits are kept until the slices are reached from above:
        of so many structures at a time as fit into `KEPT_BYTES`.
        """
        some: list[Boxes] = [{} for _ in prompted]
        kept = 0
        for structure, boxes in enumerate(prompted):
            between = max(boxes) - min(boxes) + 1 - len(boxes) if boxes else 0
            logits = 16 * self.session.manifest.network.embedding_size**2
            needed = 4 * logits * between * len(self.masks[structure])
            if kept and kept + needed > KEPT_BYTES:
                yield some
                some, kept = [{} for _ in prompted], 0
            some[structure] = boxes
            kept += needed
        yield some

    def _follow(self, prompted: Sequence[Boxes], margin: float) -> None:
        """Follow structures from the boxes around their masks."""
        from_below: dict[tuple[int, int], Array] = {}
        upwards = range(len(self.encoder))
        for index, structure, logits, pixels in self._followed(prompted, upwards, margin):
            if index < max(prompted[structure]):  # it may be reached from above, too
                from_below[index, structure] = logits
            else:
                self._label(index, structure, pixels)
        for index, structure, logits, pixels in self._followed(prompted, upwards[::-1], margin):
            other = from_below.pop((index, structure), None)
            if other is not None:
                pixels = self._pixels(np.mean([logits, other], axis=0, dtype=np.float32))
            self._label(index, structure, pixels)
        for (index, structure), logits in from_below.items():
            self._label(index, structure, self._pixels(logits))

    def _followed(
        self, prompted: Sequence[Boxes], order: Sequence[int], margin: float
    ) -> Iterator[tuple[int, int, Array, Array]]:
        """(slice, structure, logits, their pixels) of slices that are followed into, one way."""
        boxes: Boxes = dict.fromkeys(range(len(prompted)))
        for index in order:
            boxes |= {i: known[index] for i, known in enumerate(prompted) if index in known}
            sets = {
                structure: _box_prompt(box)
                for structure, box in boxes.items()
                if box is not None and index not in prompted[structure]
            }
            if sets:
                work = {start: {index: sets} for start in self.encoder.holding(index)}
                for _, structure, logits in self._decoded(work):
                    pixels = self._pixels(logits)
                    boxes[structure] = _box(pixels > self.cut, margin)
                    yield index, structure, logits, pixels

    def _decoded(self, work: Work) -> Iterator[tuple[int, int, Array]]:
        """(slice, structure, logits of its masks (n, 4g, 4g)), blended where chunks overlap."""
        last = {key: start for start, slices in work.items() for key in _keys(slices)}
        blended: dict[tuple[int, int], Array] = {}
        weights: dict[tuple[int, int], float] = defaultdict(float)
        for start, slices in work.items():
            for index, sets in slices.items():
                weight = self.encoder.weight(start, index)
                for structure, logits in self._decode(start, index, sets):
                    key = index, structure
                    weights[key] += weight
                    before = blended.get(key, logits)
                    blended[key] = before + (logits - before) * (weight / weights[key])
            for key in _keys(slices):
                if last[key] == start:
                    yield *key, blended.pop(key)

    def _decode(
        self, start: int, index: int, sets: Mapping[int, Prompt]
    ) -> Iterator[tuple[int, Array]]:
        """(structure, logits of its masks) of one chunk's slice, for every structure's set."""
        embedding = self.encoder.chunk(start)[index - start]
        self.frame = embedding.frame
        backend, manifest = self.session.backend, self.session.manifest
        structures = list(sets)
        for first in range(0, len(structures), SETS_AT_ONCE):
            some = structures[first : first + SETS_AT_ONCE]  # all logits at once would be too many
            begun = perf_counter()
            logits, _ = decode(backend, manifest, embedding, [sets[one] for one in some])
            self.decode_ms[index] += 1e3 * (perf_counter() - begun)
            for structure, of_set in zip(some, logits, strict=True):
                yield structure, of_set[self.masks[structure]]

    def _pixels(self, logits: Array) -> Array:
        """(n, 4g, 4g) → (n, H, W)."""
        assert self.frame is not None
        return transforms.upsample(logits, self.frame)

    def _label(self, index: int, structure: int, pixels: Array) -> None:
        self.label_map.add(index, pixels, self.labels[structure])


def _keys(slices: Mapping[int, Mapping[int, Prompt]]) -> list[tuple[int, int]]:
    """(slice, structure) of every set."""
    return [(index, structure) for index, sets in slices.items() for structure in sets]


def _box(inside: NDArray[np.bool_], margin: float) -> Array | None:
    """The box around masks (n, H, W) of a slice, enlarged; None if they are empty."""
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
