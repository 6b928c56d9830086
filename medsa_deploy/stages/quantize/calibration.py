"""A user's images → the ranges of an encoder's activations.

Images go through the session's own preprocessing and the float32 encoder, one at a time; of each
activation only its extremes and a histogram are kept. What has been measured is saved every few
images in the system's temporary folder, and taken up again for the same encoder and images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Calibration, Manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.evaluation.cases import Case, image_case
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.ranges import HIGH, LOW, SAMPLE, computed_values, watch
from medsa_deploy.images import Image, Volume, find_images, is_volume, read_image, read_volume
from medsa_deploy.runtime import Session

from .candidates import CandidateRunner, RecordingBackend

logger = logging.getLogger(__name__)

FEWEST = 32
"""Fewer images than this may not show the range of activations."""
SLICES = 16
"""Of a volume, so many slices are taken, evenly spaced; flat ones are left out."""
CHUNKS = 4
"""Of a volume, so many chunks are taken for a network that sees depth."""
HELD_OUT = 4
"""Of eight images or more, so many are kept from the calibration, to judge it by."""
SAVED_EVERY = 8
"""Images between two savings."""
BINS = 2048
LEAST_TOP = 2.0**-20
"""Activations that are smaller everywhere are as good as zero."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the network sees at once: a file's image, or a volume's slices from `index` on."""

    path: Path
    index: int | None = None

    @property
    def name(self) -> str:
        """The file's name, and the slice."""
        return self.path.name if self.index is None else f"{self.path.name} {self.index}"


@dataclass(eq=False)
class Histogram:
    """Magnitudes of an activation: counts in equal bins from 0 to `top`, which only grows."""

    top: float = LEAST_TOP
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count a sample; while it goes beyond `top`, pairs of bins are merged."""
        magnitudes = np.abs(values)
        highest = float(magnitudes.max(initial=0.0))
        if not self.counts.any():
            self.top = max(highest, LEAST_TOP)
        while self.top < highest:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2)])
            self.top *= 2
        self.counts += np.histogram(magnitudes, bins=BINS, range=(0, self.top))[0]

    def percentile(self, percent: float) -> float:
        """The magnitude below which so many percent lie: the upper edge of its bin."""
        below = np.cumsum(self.counts)
        found = int(np.searchsorted(below, below[-1] * percent / 100))
        return self.top * (min(found, BINS - 1) + 1) / BINS


@dataclass(eq=False)
class Measured:
    """What was measured of an encoder's activations."""

    done: int = 0
    """Images measured so far, in the order of the sources."""
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def note(self, output: str, value: NDArray[np.float32]) -> None:
        """Take one of the watched outputs into account."""
        if output.endswith(LOW):
            name = output.removesuffix(LOW)
            self.low[name] = min(self.low.get(name, np.inf), float(value))
        elif output.endswith(HIGH):
            name = output.removesuffix(HIGH)
            self.high[name] = max(self.high.get(name, -np.inf), float(value))
        else:
            self.histograms.setdefault(output.removesuffix(SAMPLE), Histogram()).add(value)

    def largest(self) -> dict[str, float]:
        """Largest magnitude of every value."""
        return {name: max(-self.low[name], self.high[name]) for name in self.low}

    def ranges(self, percent: float | None) -> dict[str, tuple[float, float]]:
        """What the codes of each activation span: everything, or a percentile of magnitudes."""
        found = {}
        for name, histogram in self.histograms.items():
            top = np.inf if percent is None else histogram.percentile(percent)
            found[name] = (max(self.low[name], -top), min(self.high[name], top))
        return found


def find_sources(paths: Sequence[Path], chunk: int = 1) -> list[Source]:
    """The images of files and folders; of volumes, evenly spaced slices or chunks of slices.

    UsageError without any; ImageError for a volume of fewer slices than a chunk.
    """
    found: list[Source] = []
    for path in paths:
        if path.is_dir() and not is_volume(path):
            for file in find_images(path):
                found += _sources(file, chunk)
        else:
            found += _sources(path, chunk)
    if not found:
        raise UsageError(
            "int8 is fitted to your own images: give --calibration a folder of them, or files"
        )
    if len(found) * chunk < FEWEST:
        logger.warning(
            "calibration on %d image(s): %d or more, unlike each other, are better",
            len(found) * chunk,
            FEWEST,
        )
    return found


def hold_out(sources: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Images to calibrate on, and evenly spaced ones to judge by: the same where there are few."""
    if len(sources) < 2 * HELD_OUT:
        return list(sources), list(sources[:HELD_OUT])
    places = np.linspace(0, len(sources) - 1, HELD_OUT + 2).round().astype(int)[1:-1].tolist()
    rest = [source for i, source in enumerate(sources) if i not in places]
    return rest, [sources[i] for i in places]


def image_cases(sources: Sequence[Source], made: Manifest) -> list[Case]:
    """A case on each source, with prompts of every kind."""
    side = made.mask_prompt_size
    found = zip(sources, _images(sources, made), strict=True)
    return [image_case(source.name, images, side) for source, (images, _) in found]


def described(sources: Sequence[Source], chunk: int, method: str) -> Calibration:
    """What the manifest says of a calibration."""
    names = "\n".join(source.name for source in sources)
    return Calibration(
        images=len(sources) * chunk,
        names_sha256=hashlib.sha256(names.encode()).hexdigest(),
        method=method,
    )


def measure(
    trials: CandidateRunner,
    folder: Path,
    sources: Sequence[Source],
    activations: Collection[str],
    on_image: Callable[[int, int], None],
) -> Measured:
    """Run the float32 encoder on every image; `activations` get histograms, all values extremes."""
    saved = _saved_path(trials, sources, activations)
    measured = _load(saved)
    model = load_graph(trials.encoder)
    watch(model, computed_values(model), sampled=activations)
    encoder = save_graph(model, folder / "encoder.watched.onnx")[0]
    del model
    made = trials.manifest
    watchers = {"encoder": measured.note, "decoder": lambda output, value: None}
    backend = RecordingBackend(encoder, trials.decoder, made, watchers, trials.threads)
    on_image(measured.done, len(sources))
    with Session(made, backend) as session:
        for images, window in _images(sources[measured.done :], made):
            session.encode_slices(images, intensity_window=window)
            measured.done += 1
            on_image(measured.done, len(sources))
            if measured.done % SAVED_EVERY == 0 or measured.done == len(sources):
                _save(measured, saved)
    return measured


def _sources(path: Path, chunk: int) -> Iterator[Source]:
    """A file's image, or slices or chunks of the volume in a file or folder."""
    if chunk == 1 and not is_volume(path):
        read_image(path)  # what cannot be read is refused before minutes of work
        yield Source(path=path)
        return
    volume = read_volume(path)
    if len(volume) < chunk:
        raise ImageError(
            f"{path} has {len(volume)} slices; this network sees {chunk} at a time: calibrate on "
            "volumes of as many"
        )
    count = SLICES if chunk == 1 else CHUNKS
    for index in np.unique(np.linspace(0, len(volume) - chunk, count).round().astype(int)):
        if np.ptp(volume.slice(int(index) + chunk // 2).pixels):
            yield Source(path=path, index=int(index))


def _images(
    sources: Sequence[Source], made: Manifest
) -> Iterator[tuple[list[Image], tuple[float, float] | None]]:
    """What each source holds, and a volume's intensity window; a volume is opened once."""
    opened: tuple[Path, Volume] | None = None
    for source in sources:
        if source.index is None:
            yield [read_image(source.path)], None
            continue
        if opened is None or opened[0] != source.path:
            opened = source.path, read_volume(source.path)
        volume = opened[1]
        slices = range(source.index, source.index + made.network.chunk)
        yield [volume.slice(i) for i in slices], _window(volume, made)


def _window(volume: Volume, made: Manifest) -> tuple[float, float] | None:
    """The whole volume's range, where nothing else maps its intensities to display values."""
    conventions = made.conventions
    if conventions.intensity_window or volume.rendered or volume.dtype == np.uint8:
        return None
    if transforms.PREPROCESSING[conventions.preprocess].min_max:
        return None
    return volume.intensity_range()


def _saved_path(
    trials: CandidateRunner, sources: Sequence[Source], activations: Collection[str]
) -> Path:
    """Where the ranges of this encoder on these images are saved."""
    entries = [
        (str(source.path.resolve()), source.index, stat.st_size, stat.st_mtime_ns)
        for source in sources
        for stat in [source.path.stat()]
    ]
    made = trials.manifest
    window, preprocess = made.conventions.intensity_window, made.conventions.preprocess
    encoder = made.file("encoder").sha256
    key = json.dumps([encoder, preprocess, window, entries, sorted(activations), BINS])
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"medsa-deploy-{user}"
    return folder / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _save(measured: Measured, path: Path) -> None:
    """Save what was measured so far; where that cannot be, a later run starts anew."""
    names = list(measured.histograms)
    values = list(measured.low)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        np.savez_compressed(
            temporary,
            done=np.array(measured.done),
            values=np.array(values, np.str_),
            low=np.array([measured.low[name] for name in values]),
            high=np.array([measured.high[name] for name in values]),
            names=np.array(names, np.str_),
            tops=np.array([measured.histograms[name].top for name in names]),
            counts=np.array([measured.histograms[name].counts for name in names]),
        )
        temporary.replace(path)
    except OSError as e:
        logger.info("the calibration so far is not saved: %s", e)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> Measured:
    """What was saved, or nothing measured yet."""
    try:
        with np.load(path, allow_pickle=False) as data:
            values, names = data["values"].tolist(), data["names"].tolist()
            histograms = {
                name: Histogram(float(top), counts)
                for name, top, counts in zip(names, data["tops"], data["counts"], strict=True)
            }
            return Measured(
                done=int(data["done"]),
                low=dict(zip(values, data["low"].tolist(), strict=True)),
                high=dict(zip(values, data["high"].tolist(), strict=True)),
                histograms=histograms,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return Measured()
