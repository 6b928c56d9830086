"""DICOM slices that share their places → the slices of one phase of the heart, echo or dose level.

A phase is the k-th image of every place, in the order of acquisition. Copies of one image are no
phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medsa_deploy.errors import ImageError

from .stacking import SAME_PLACE_MM, SliceHeader


def choose_phase(
    path: Path, headers: Sequence[SliceHeader], phase: int | None
) -> Sequence[SliceHeader]:
    """The headers of phase `phase`; all of them if each has a place of its own.

    ImageError for a choice that does not exist, and for several phases without a choice.
    """
    places = _places(headers)
    counts = {len(members) for members in places}
    copies = any(len({(h.uid, h.number) for h in members}) < len(members) for members in places)
    if copies or len(counts) != 1 or counts == {1}:  # `stack` names what does not belong together
        if phase is not None and counts == {1}:
            raise ImageError(f"{path} has one image at each place: leave the phase out")
        return headers
    (count,) = counts
    if phase is None or not 0 <= phase < count:
        choice = "none was given" if phase is None else f"{phase} was given"
        raise ImageError(
            f"{path} has {count} images at each of {len(places)} places, such as "
            f"{', '.join(header.name for header in places[0][:3])}: choose a phase (--phase) "
            f"0…{count - 1}; {choice}"
        )
    return [members[phase] for members in places]


def _places(headers: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """The headers in groups of one place, each in the order of acquisition."""
    groups: list[tuple[np.ndarray, list[SliceHeader]]] = []
    by_position = sorted(headers, key=lambda header: header.position or ())
    for header in by_position:
        position = np.array(header.position or ())
        if groups and position.shape == (3,) == groups[-1][0].shape:
            if np.abs(position - groups[-1][0]).max() < SAME_PLACE_MM:
                groups[-1][1].append(header)
                continue
        groups.append((position, [header]))
    return [sorted(members, key=lambda header: header.acquired) for _, members in groups]
