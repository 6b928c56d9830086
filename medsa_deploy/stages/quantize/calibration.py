"""A user's images → the ranges of an encoder's activations.

Images go through the session's preprocessing and the float32 encoder, one at a time. Each
activation adds to its extremes and its histogram. These are saved every few images in the system's
temporary folder; a later run with the same encoder and images continues from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.atomic import whole_file
from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.bundle.recipe import Calibration
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.evaluation.cases import Case, image_case, needed_prompts
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.ranges import HIGH, LOW, SAMPLE, computed_values, watch
from medsa_deploy.images import Image, Volume, find_images, is_volume, read_image, read_volume
from medsa_deploy.runtime import Session

from .candidates import CandidateRunner, RecordingBackend

logger = logging.getLogger(__name__)

FEWEST = 32
"""Fewer images than this may not show the range of activations."""
SLICES = 16
"""Slices taken from a volume, evenly spaced; flat slices are left out."""
CHUNKS = 4
"""Chunks taken from a volume for a network that sees depth."""
HELD_OUT = 4
"""Images that are left out of the calibration, to judge it by, if there are eight or more."""
SAVED_EVERY = 8
"""Images between two savings."""
BINS = 2048
LEAST_TOP = 2.0**-20
"""The least upper end of a histogram; smaller activations count as zero."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One input of the network: a file's image, or a volume's slices from `index` on."""

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
        """The magnitude below which `percent` of the values lie: the upper edge of its bin."""
        below = np.cumsum(self.counts)
        bin_index = int(np.searchsorted(below, below[-1] * percent / 100))
        return self.top * (min(bin_index, BINS - 1) + 1) / BINS


@dataclass(eq=False)
class Measured:
    """The measured extremes and histograms of an encoder's activations."""

    done: int = 0
    """Images measured so far, in the order of the sources."""
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def note(self, output: str, value: NDArray[np.float32]) -> None:
        """Add the value of a watched output."""
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
        """The range of each activation's codes: all values, or a percentile of magnitudes."""
        ranges = {}
        for name, histogram in self.histograms.items():
            top = np.inf if percent is None else histogram.percentile(percent)
            ranges[name] = (max(self.low[name], -top), min(self.high[name], top))
        return ranges


def find_sources(paths: Sequence[Path], chunk: int = 1) -> list[ImageSource]:
    """The images of files and folders; for volumes, evenly spaced slices or chunks of slices.

    UsageError if there are no images; ImageError for a volume of fewer slices than a chunk.
    """
    sources: list[ImageSource] = []
    for path in paths:
        if path.is_dir() and not is_volume(path):
            for file in find_images(path):
                sources += _sources(file, chunk)
        else:
            sources += _sources(path, chunk)
    if not sources:
        raise UsageError(
            "int8 is fitted to your own images: give --calibration a folder of them, or files"
        )
    if len(sources) * chunk < FEWEST:
        logger.warning(
            "calibration on %d image(s): %d or more, unlike each other, are better",
            len(sources) * chunk,
            FEWEST,
        )
    return sources


def hold_out(sources: Sequence[ImageSource]) -> tuple[list[ImageSource], list[ImageSource]]:
    """Images to calibrate on, and evenly spaced images to judge by; the two overlap for few."""
    if len(sources) < 2 * HELD_OUT:
        return list(sources), list(sources[:HELD_OUT])
    places = np.linspace(0, len(sources) - 1, HELD_OUT + 2).round().astype(int)[1:-1].tolist()
    calibration = [source for i, source in enumerate(sources) if i not in places]
    return calibration, [sources[i] for i in places]


def image_cases(sources: Sequence[ImageSource], manifest: Manifest) -> list[Case]:
    """A case on each source, with prompts of every kind that the network takes."""
    side, need = manifest.mask_prompt_size, manifest.conventions.prompts
    cases = [
        image_case(source.name, images, side)
        for source, (images, _) in zip(sources, _images(sources, manifest), strict=True)
    ]
    return [replace(case, prompts=needed_prompts(case.prompts, need)) for case in cases]


def described(sources: Sequence[ImageSource], chunk: int, method: str) -> Calibration:
    """The manifest's entry for a calibration."""
    names = "\n".join(source.name for source in sources)
    return Calibration(
        images=len(sources) * chunk,
        names_sha256=hashlib.sha256(names.encode()).hexdigest(),
        method=method,
    )


def measure(
    runner: CandidateRunner,
    folder: Path,
    sources: Sequence[ImageSource],
    activations: Collection[str],
    on_image: Callable[[int, int], None],
) -> Measured:
    """Run the float32 encoder on every image; `activations` get histograms, all values extremes."""
    saved = _saved_path(runner, sources, activations)
    measured = _load(saved)
    model = load_graph(runner.encoder)
    watch(model, computed_values(model), sampled=activations)
    encoder = save_graph(model, folder / "encoder.watched.onnx")[0]
    del model
    manifest = runner.manifest
    watchers = {"encoder": measured.note, "decoder": lambda output, value: None}
    backend = RecordingBackend(encoder, runner.decoder, manifest, watchers, runner.threads)
    on_image(measured.done, len(sources))
    with Session(manifest, backend) as session:
        for images, window in _images(sources[measured.done :], manifest):
            session.encode_slices(images, intensity_window=window)
            measured.done += 1
            on_image(measured.done, len(sources))
            if measured.done % SAVED_EVERY == 0 or measured.done == len(sources):
                _save(measured, saved)
    return measured


def _sources(path: Path, chunk: int) -> Iterator[ImageSource]:
    """A file's image, or slices or chunks of the volume in a file or folder."""
    if chunk == 1 and not is_volume(path):
        read_image(path)  # refuses an unreadable image before minutes of work
        yield ImageSource(path=path)
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
            yield ImageSource(path=path, index=int(index))


def _images(
    sources: Sequence[ImageSource], manifest: Manifest
) -> Iterator[tuple[list[Image], tuple[float, float] | None]]:
    """Each source's images, and a volume's intensity window; a volume is opened once."""
    opened: tuple[Path, Volume] | None = None
    for source in sources:
        if source.index is None:
            yield [read_image(source.path)], None
            continue
        if opened is None or opened[0] != source.path:
            opened = source.path, read_volume(source.path)
        volume = opened[1]
        slices = range(source.index, source.index + manifest.network.chunk)
        yield [volume.slice(i) for i in slices], _window(volume, manifest)


def _window(volume: Volume, manifest: Manifest) -> tuple[float, float] | None:
    """The volume's range; None if something else maps its intensities to display values."""
    conventions = manifest.conventions
    if conventions.intensity_window or volume.rendered or volume.dtype == np.uint8:
        return None
    if transforms.PREPROCESSING[conventions.preprocess].min_max:
        return None
    return volume.intensity_range()


def _saved_path(
    runner: CandidateRunner, sources: Sequence[ImageSource], activations: Collection[str]
) -> Path:
    """The file that the ranges of this encoder on these images are saved in."""
    entries = [
        (str(source.path.resolve()), source.index, stat.st_size, stat.st_mtime_ns)
        for source in sources
        for stat in [source.path.stat()]
    ]
    manifest = runner.manifest
    window, preprocess = manifest.conventions.intensity_window, manifest.conventions.preprocess
    encoder = manifest.file("encoder").sha256
    key = json.dumps([encoder, preprocess, window, entries, sorted(activations), BINS])
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"medsa-deploy-{user}"
    return folder / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _save(measured: Measured, path: Path) -> None:
    """Save the measurements so far. If they cannot be saved, a later run starts again."""
    names = list(measured.histograms)
    values = list(measured.low)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with whole_file(path) as temporary:
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
    except OSError as e:
        logger.info("the calibration so far is not saved: %s", e)


def _load(path: Path) -> Measured:
    """The saved measurements, or an empty start."""
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
