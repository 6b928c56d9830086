"""A session, a picture and the structures of a prompt file → one mask, with a label for each.

The picture is segmented as a volume of one slice. Prompts have z = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from medsa_deploy.images import read_image, write_mask, write_overlay
from medsa_deploy.images.files import output_file
from medsa_deploy.images.picture import picture_volume
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.volumes.segment import VolumeOptions, segment_volume
from medsa_deploy.runtime.volumes.structures import Structure
from medsa_deploy.transforms.intensities import intensities

from .images import ImageOptions, MaskTargets, Segmentation


def segment_picture(
    session: Session,
    path: Path,
    structures: Sequence[Structure],
    targets: MaskTargets,
    options: ImageOptions,
) -> Segmentation:
    """Segment the structures of a picture and write the mask and the overlay, all or none.

    The mask is uint8 labels, for one label 0 and 255. PromptError for prompts that do not fit.
    """
    image = read_image(path, nan=options.nan)
    volume = picture_volume(image)
    prediction = segment_volume(
        session,
        volume,
        structures,
        VolumeOptions(intensity_window=options.intensity_window, threshold=options.threshold),
    )
    plane = np.ascontiguousarray(volume.plane(prediction.labels, 0))
    labels = plane > 0 if len(prediction.names) == 1 else plane
    assert targets.mask is not None
    with ExitStack() as written:  # renames the overlay once the mask is written
        if targets.overlay is not None:
            background, _ = intensities(image, session.conventions, prediction.intensity_window)
            write_overlay(
                written.enter_context(output_file(targets.overlay)),
                background,
                labels,
                points=[(x, y) for structure in structures for x, y, _ in structure.points],
                labels=[label for structure in structures for label in structure.labels],
                boxes=[
                    (b[0], b[1], b[3], b[4]) for structure in structures for b in structure.boxes
                ],
            )
        write_mask(targets.mask, labels, image)
    counts = np.bincount(plane.ravel(), minlength=len(prediction.names) + 1)
    return Segmentation(
        image=path,
        mask=targets.mask,
        overlay=targets.overlay,
        pixels={name: int(counts[label]) for label, name in enumerate(prediction.names, 1)},
        image_size=(image.pixels.shape[0], image.pixels.shape[1]),
        intensity_window=prediction.intensity_window,
        timings_ms=prediction.timings_ms,
        degraded=prediction.degraded,
    )
