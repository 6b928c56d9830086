"""The image of the demonstrations: the MNI T1 template, its structures, and prompts for them.

The MNI ICBM152 2009a template with its tissue maps, an average of 152 heads, not a patient. It is
in the wheel nilearn, which comes with the extra `demo`; nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import MissingDependencyError
from medsa_deploy.images import Image, read_image

FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
AXIAL = 2
"""The template's axis from feet to head."""
LABEL_THRESHOLD = 128
"""Tissue maps hold probabilities 0…255."""
Mask = NDArray[np.bool_]


def template(kind: str = "t1") -> Path:
    """The T1 template, or its tissue map `wm` or `gm`."""
    return file_in("nilearn", FILE.format(kind))


def axial_slice(index: int) -> Image:
    """An axial slice of the T1 template."""
    return read_image(template(), axis=AXIAL, index=index)


def structures(slices: Sequence[int]) -> dict[str, Mask]:
    """White matter, grey matter, both together, and the rest that is not black, on axial slices.

    Each is (len(slices), H, W). The rest is mostly cerebrospinal fluid.
    """
    values = {
        kind: np.stack([read_image(template(kind), axis=AXIAL, index=i).pixels for i in slices])
        for kind in ("t1", "wm", "gm")
    }
    white, grey = (values[kind] >= LABEL_THRESHOLD for kind in ("wm", "gm"))
    brain = white | grey
    fluid = (values["t1"] > 0) & ~brain
    return {"white matter": white, "grey matter": grey, "brain": brain, "fluid": fluid}


def inner_point(label: Mask) -> tuple[int, int]:
    """x, y of the pixel of a label (H, W) nearest to its centre of mass."""
    rows, columns = np.nonzero(label)
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    nearest = int(np.argmin(distance))
    return int(columns[nearest]), int(rows[nearest])


def file_in(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            package.replace("_", "-"), extra="demo", purpose="the demonstration"
        )
    return Path(spec.submodule_search_locations[0]) / name
