"""A volume and prompts in its voxels → a label map, slice by slice.

Chunks are encoded only if they have a prompt, or a mask is followed into them. A slice's logits go
into the label map as soon as all chunks that hold it are decoded. If a mask may reach a slice from
two prompts, its logits are kept until then, at low resolution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.errors import UsageError
from medsa_deploy.images.volume import Volume
from medsa_deploy.runtime.backends.interface import Array
from medsa_deploy.runtime.decoding import SETS_AT_ONCE
from medsa_deploy.runtime.prediction import best_candidates
from medsa_deploy.transforms import UNPROMPTED, Frame, MaskRule, Prompt
from medsa_deploy.transforms.intensities import IntensityWindow

from .chunk_encoder import ChunkEncoder
from .chunk_prompts import Work, nearest_first, prompted_chunks
from .label_map import LabelMap
from .structures import (
    Labelling,
    SlicePrompts,
    Structure,
    labelling,
    slice_prompts,
)

if TYPE_CHECKING:
    from medsa_deploy.runtime.session import Session

MARGIN = 3.0
"""Pixels by which the box of a mask is enlarged to prompt the next slice."""
KEPT_BYTES = 256 * 2**20
"""Memory for logits between the prompts of structures that are followed together."""

Boxes = dict[int, Array | None]
"""Slice → the box around a structure's mask there, None if it is empty."""
Followed = tuple[int, int, Array, Array]
"""Slice, structure, the logits of its masks there, and their pixels."""
OnLabels = Callable[[int, NDArray[np.uint8]], None]
"""Called with a slice and its labels (H, W) so far, a view of the label map."""


@dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """How a volume is segmented.

    >>> from medsa_deploy import VolumeOptions
    >>> followed = VolumeOptions(intensity_window=(-175, 250), propagate=True, margin=5)
    """

    intensity_window: IntensityWindow = None
    """Intensities of black and white; "auto" for percentiles without padding; None for the
    bundle's, or the file's."""
    threshold: float | None = None
    """Probability above which a voxel belongs to a mask; None for the bundle's."""
    overlap: int = 0
    """Slices that neighbouring chunks of a 3D network share; their logits are blended."""
    propagate: bool = False
    """Follow each mask into the slices beyond the prompts, until it is empty."""
    margin: float | None = None
    """Pixels added on every side of a followed mask's box; None for 3. Only with `propagate`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VolumePrediction:
    """The label map of a volume.

    >>> from medsa_deploy import Structure, load, read_volume
    >>> volume = read_volume("ct.nii.gz")
    >>> with load("liver.medsa") as session:
    ...     prediction = session.segment_volume(volume, [Structure(points=((20, 15, 2),))])
    >>> prediction.labels.shape, prediction.labels.dtype.name, prediction.slices
    ((40, 30, 5), 'uint8', (2,))
    """

    labels: NDArray[np.uint8]
    """(X, Y, Z) in the volume's stored order: 0 for background, else a number from 1."""
    names: tuple[str, ...]
    """The name of label k is `names[k − 1]`."""
    slices: tuple[int, ...]
    """Slices that were segmented, in order; all others are background."""
    intensity_window: tuple[float, float] | None
    """Intensities that were mapped to black and white in every slice; see `volume_window`."""
    timings_ms: dict[str, float]
    """Medians over slices: `encode` includes preprocessing, `decode` all structures of a slice."""
    degraded: str | None = None
    """Why a fallback backend made some of it; None if the backend that was asked for made all."""


def segment_volume(
    session: Session,
    volume: Volume,
    structures: Sequence[Structure],
    options: VolumeOptions | None = None,
    *,
    on_slice: Callable[[int, int], None] = lambda done, total: None,
    near: int | None = None,
    on_labels: OnLabels = lambda index, plane: None,
) -> VolumePrediction:
    """Segment the slices that have prompts and, with `propagate`, those that the masks reach.

    If labels overlap, a voxel belongs to the one with the highest logit. Without structures, a
    network that needs no prompts segments its classes on every slice. `on_slice` is called with the
    number of slices encoded so far, and the most that will be. With `near`, slices are segmented in
    the order of their distance from it. `on_labels` is called with each slice and its labels so
    far. PromptError for prompts that cannot be used, ImageError for a volume that cannot be used.

    >>> from medsa_deploy import Structure, VolumeOptions, load, read_volume, segment_volume
    >>> volume = read_volume("ct.nii.gz")
    >>> liver = Structure(boxes=((5, 5, 1, 30, 25, 4),), name="liver")
    >>> window = VolumeOptions(intensity_window=(-175, 250))
    >>> with load("liver.medsa") as session:
    ...     prediction = segment_volume(session, volume, [liver], window)
    >>> prediction.names, prediction.slices
    (('liver',), (1, 2, 3))
    """
    options = options or VolumeOptions()
    margin = _margin(options)
    rule = transforms.mask_rule(session.manifest, options.threshold)
    labels_of, prompts = _labels_and_prompts(session, volume, structures, options)
    total = len(volume)
    encoder = ChunkEncoder(
        session,
        volume,
        overlap=options.overlap,
        intensity_window=options.intensity_window,
        on_slice=lambda done: on_slice(done, total),
    )
    work = nearest_first(prompted_chunks(prompts, encoder, session), near)
    label_map = LabelMap(volume, pixel_threshold(rule), revisited=len(structures) > 1)
    run = _Run(session, encoder, labels_of, label_map, rule, on_labels)
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


def _labels_and_prompts(
    session: Session, volume: Volume, structures: Sequence[Structure], options: VolumeOptions
) -> tuple[Labelling, list[SlicePrompts]]:
    """The labels of each structure's masks, and its prompts slice by slice.

    Without structures, a network that needs no prompts segments all its classes on every slice.
    """
    if structures or session.conventions.prompts == "required":
        labels = labelling(structures, session.manifest)
        return labels, [slice_prompts(structure, volume) for structure in structures]
    if options.propagate:
        raise UsageError(
            "propagation follows prompts, and none was given: without prompts this network "
            "segments every slice; leave --propagate out"
        )
    everywhere = dict.fromkeys(range(len(volume)), UNPROMPTED)
    return labelling([Structure()], session.manifest), [everywhere]


def _margin(options: VolumeOptions) -> float:
    """The margin in pixels; UsageError for one that cannot be used."""
    if options.margin is None:
        return MARGIN
    if not options.propagate:
        raise UsageError("a margin is for masks that are followed: add --propagate, or omit it")
    if not 0 <= options.margin < inf:
        raise UsageError(f"a margin of {options.margin:g} pixels cannot be used: give 0 or more")
    return options.margin


class _Run:
    """Decoding the slices of one volume into its label map."""

    def __init__(
        self,
        session: Session,
        encoder: ChunkEncoder,
        labelling: Labelling,
        label_map: LabelMap,
        rule: MaskRule,
        on_labels: OnLabels,
    ) -> None:
        self.session, self.on_labels = session, on_labels
        self.encoder = encoder
        self.label_map = label_map
        self.masks = [[mask for mask, _ in channels] for channels in labelling.channels]
        """For each structure, the decoder's masks that it needs."""
        self.labels = [[label for _, label in channels] for channels in labelling.channels]
        """For each structure, the labels that these masks become."""
        self.rule, self.threshold = rule, pixel_threshold(rule)
        manifest = session.manifest
        self.best_alone = manifest.network.outputs == "sam" and (
            manifest.conventions.mask_choice == "best"
        )
        """Whether a structure's mask is the best of the decoder's candidates."""
        self.decode_ms: dict[int, float] = defaultdict(float)
        """Slice → milliseconds, for every slice that was segmented."""
        self.frame: Frame | None = None

    def segment(self, work: Work) -> None:
        """Segment the slices that have prompts."""
        for index, structure, logits in self._decoded(work):
            self._label(index, structure, self._pixels(structure, logits))

    def propagate(self, work: Work, margin: float) -> None:
        """Segment the slices that have prompts, and follow structures up and down from there.

        The box of a mask prompts the next slice. A slice that is reached from both sides gets the
        mean of the two.
        """
        prompted: list[Boxes] = [{} for _ in self.masks]
        for index, structure, logits in self._decoded(work):
            pixels = self._pixels(structure, logits)
            prompted[structure][index] = _box(pixels > self.threshold, margin)
            self._label(index, structure, pixels)
        for batch in self._batches_within_memory(prompted):
            self._follow(batch, margin)

    def _batches_within_memory(self, prompted: Sequence[Boxes]) -> Iterator[Sequence[Boxes]]:
        """The structures' boxes, in batches whose logits fit into `KEPT_BYTES`.

        Between two prompts a structure's logits are kept until the slices are reached from above.
        The boxes of structures that are not in a batch are empty.
        """
        batch: list[Boxes] = [{} for _ in prompted]
        batch_bytes = 0
        for structure, boxes in enumerate(prompted):
            between = max(boxes) - min(boxes) + 1 - len(boxes) if boxes else 0
            logits = 16 * self.session.manifest.network.embedding_size**2
            structure_bytes = 4 * logits * between * len(self.masks[structure])
            if batch_bytes and batch_bytes + structure_bytes > KEPT_BYTES:
                yield batch
                batch, batch_bytes = [{} for _ in prompted], 0
            batch[structure] = boxes
            batch_bytes += structure_bytes
        yield batch

    def _follow(self, prompted: Sequence[Boxes], margin: float) -> None:
        """Follow structures from the boxes around their masks, a chunk up and a chunk down."""
        waiting: dict[tuple[int, int], Array] = {}
        upwards = range(len(self.encoder))
        ways = [self._followed(prompted, way, margin) for way in (upwards, upwards[::-1])]
        for index, structure, logits, pixels in _alternately(ways):
            key = index, structure
            if min(prompted[structure]) < index < max(prompted[structure]):
                if key not in waiting:  # it may also be reached the other way
                    waiting[key] = logits
                    continue
                mean = np.mean([logits, waiting.pop(key)], axis=0, dtype=np.float32)
                pixels = self._pixels(structure, np.asarray(mean))
            self._label(index, structure, pixels)
        for (index, structure), logits in waiting.items():
            self._label(index, structure, self._pixels(structure, logits))

    def _followed(
        self, prompted: Sequence[Boxes], order: Sequence[int], margin: float
    ) -> Iterator[Followed | None]:
        """The slices that masks reach, one way; None after each chunk."""
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
                    pixels = self._pixels(structure, logits)
                    boxes[structure] = _box(pixels > self.threshold, margin)
                    yield index, structure, logits, pixels
            if index % self.encoder.size == (self.encoder.size - 1 if order[0] == 0 else 0):
                yield None

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
                for structure in sets:
                    if last[index, structure] == start:
                        yield index, structure, blended.pop((index, structure))

    def _decode(
        self, start: int, index: int, sets: Mapping[int, Prompt]
    ) -> Iterator[tuple[int, Array]]:
        """(structure, logits of its masks) of one chunk's slice, for every structure's set."""
        embedding = self.encoder.chunk(start)[index - start]
        self.frame = embedding.frame
        structures = list(sets)
        for first in range(0, len(structures), SETS_AT_ONCE):
            # all logits at once would be too many
            batch = structures[first : first + SETS_AT_ONCE]
            start_time = perf_counter()
            logits, scores = self.session.decode_logits(embedding, [sets[i] for i in batch])
            if self.best_alone:
                logits, _, _ = best_candidates(logits[:, 1:], scores[:, 1:], None)
            self.decode_ms[index] += 1e3 * (perf_counter() - start_time)
            for structure, of_set in zip(batch, logits, strict=True):
                # classes that exclude each other are compared with all others
                yield structure, of_set if self.rule.exclusive else of_set[self.masks[structure]]

    def _pixels(self, structure: int, logits: Array) -> Array:
        """Logits of a structure's slice → values (n, H, W) of the masks that it needs."""
        assert self.frame is not None
        values = transforms.pixel_values(logits, self.frame, self.rule.postprocess)
        if self.rule.exclusive:
            return transforms.class_margins(values)[self.masks[structure]]
        return values

    def _label(self, index: int, structure: int, pixels: Array) -> None:
        self.label_map.add(index, pixels, self.labels[structure])
        self.on_labels(index, self.label_map.plane(index))


def pixel_threshold(rule: MaskRule) -> float:
    """The value that a mask's pixels exceed; a margin over all other classes exceeds 0."""
    return 0.0 if rule.exclusive else rule.threshold


def _keys(slices: Mapping[int, Mapping[int, Prompt]]) -> list[tuple[int, int]]:
    """(slice, structure) of every set."""
    return [(index, structure) for index, sets in slices.items() for structure in sets]


def _alternately(ways: Sequence[Iterator[Followed | None]]) -> Iterator[Followed]:
    """What each way yields up to its next None, in turn, until every way has ended."""
    left = list(ways)
    while left:
        for way in list(left):
            for item in way:
                if item is None:
                    break
                yield item
            else:
                left.remove(way)


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
    """A prompt set with a box only."""
    no_points = np.zeros((0, 2), np.float32)
    return Prompt(points=no_points, labels=no_points[:, 0], box=box, mask=None)
