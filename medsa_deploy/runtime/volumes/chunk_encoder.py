"""A volume → the embeddings of its slices, encoded chunk by chunk as they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images.volume import Volume
from medsa_deploy.runtime.decoding import Embedding
from medsa_deploy.transforms import PREPROCESSING
from medsa_deploy.transforms.intensities import IntensityWindow, warn_of_stretching

if TYPE_CHECKING:
    from medsa_deploy.runtime.session import Session

KEPT_BYTES = 512 * 2**20
"""Memory for embeddings that may be needed again: 128 slices at an image size of 1024."""


class ChunkEncoder:
    """Encodes chunks of neighbouring slices, and keeps the latest; `len` is the number of slices.

    Chunk s holds the slices s … s + D − 1. The last chunk is completed by repeating the last slice,
    so that every slice is in a chunk. With an overlap, neighbouring chunks share slices.
    """

    def __init__(
        self,
        session: Session,
        volume: Volume,
        *,
        overlap: int = 0,
        intensity_window: IntensityWindow = None,
        on_slice: Callable[[int], None] = lambda done: None,
    ) -> None:
        """`overlap`: slices that neighbouring chunks share. `on_slice` is called with the number of
        slices encoded so far. ImageError for a volume of fewer slices than a chunk.
        """
        self.size = session.manifest.network.chunk
        if len(volume) < self.size:
            raise ImageError(
                f"{volume.path} has {len(volume)} slices along axis {volume.axis}; this network "
                f"sees {self.size} at a time: give a volume of {self.size} slices or more"
            )
        if not 0 <= overlap < self.size:
            raise UsageError(
                f"an overlap of {overlap} slices does not fit chunks of {self.size}: "
                f"0…{self.size - 1} does"
                if self.size > 1
                else f"an overlap of {overlap} slices was given, but this network sees each slice "
                "alone: leave it out"
            )
        step = self.size - overlap
        self.starts = tuple(range(0, len(volume) - overlap, step))
        """First slices of all chunks."""
        self._chosen_window = intensity_window
        self._session = session
        self._volume = volume
        self._on_slice = on_slice
        self._chunks: OrderedDict[int, list[Embedding]] = OrderedDict()
        self._encoded: set[int] = set()
        self._times: list[float] = []

    def __len__(self) -> int:
        return len(self._volume)

    @cached_property
    def window(self) -> tuple[float, float] | None:
        """Intensities of black and white in every slice; see `volume_window`. Reads the volume."""
        return volume_window(self._session, self._volume, self._chosen_window)

    def chunk(self, start: int) -> list[Embedding]:
        """The embeddings of a chunk's slices, without the repeated slices of the last chunk."""
        if start in self._chunks:
            self._chunks.move_to_end(start)
            return self._chunks[start]
        last = len(self) - 1
        slices = [self._volume.slice(min(start + i, last)) for i in range(self.size)]
        embeddings = self._session.encode_slices(slices, intensity_window=self.window)
        self._times += [sum(embedding.timings_ms.values()) for embedding in embeddings]
        # image parts are larger than embeddings and quick to compute: only the last chunk's stay
        for earlier, earlier_embeddings in self._chunks.items():
            self._chunks[earlier] = [replace(e, image_part=None) for e in earlier_embeddings]
        self._chunks[start] = embeddings[: len(self) - start]
        chunk_bytes = self.size * embeddings[0].values.nbytes
        while len(self._chunks) > max(1, KEPT_BYTES // chunk_bytes):
            self._chunks.popitem(last=False)
        self._encoded |= self.slices(start)
        self._on_slice(len(self._encoded))
        return self._chunks[start]

    def slices(self, start: int) -> set[int]:
        """The slices of a chunk."""
        return set(range(start, min(start + self.size, len(self))))

    def holding(self, index: int) -> Iterator[int]:
        """The chunks a slice is in."""
        return (start for start in self.starts if start <= index < start + self.size)

    def weight(self, start: int, index: int) -> float:
        """A chunk's weight in the blend of a slice: largest for the slice in its middle."""
        return min(index - start, self.size - 1 - (index - start)) + 1

    @property
    def encode_ms(self) -> float:
        """Median over slices, preprocessing included; 0 before the first."""
        return median(self._times) if self._times else 0.0


def volume_window(
    session: Session, volume: Volume, chosen: IntensityWindow
) -> tuple[float, float] | None:
    """The window that all slices share, so that equal tissue looks equal.

    `chosen` by the caller, else the bundle's, else the file's own rendering, else from the volume's
    minimum to its maximum without padding, with a warning. None for slices with display values or a
    rendering, and for preprocessing that stretches every slice. ImageError if the window shows the
    volume as one flat grey, or a voxel is NaN or infinite.
    """
    conventions, display = session.conventions, volume.dtype == "uint8"
    if chosen == "auto":
        return volume.robust_window()
    window = chosen or (None if display else conventions.intensity_window)
    if window is None and (display or volume.rendered):
        return None
    low, high = volume.intensity_range()
    if window is None:
        if PREPROCESSING[conventions.preprocess].min_max:
            return None
        warn_of_stretching(volume.path, volume.dtype, volume.tissue, volume.robust_window())
        return low, high
    if not (window[0] < high and low < window[1]):
        raise ImageError(
            f"{volume.path}: its values {low:g}…{high:g} lie outside the intensity window "
            f"{window[0]:g}…{window[1]:g}, which shows one flat grey: choose another window"
        )
    return window
