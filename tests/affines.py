"""NIfTI geometries as scanners and converters write them: anisotropic, oblique, flipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from hypothesis import strategies as st

FIELDS = (
    "dim", "pixdim", "xyzt_units", "dim_info", "qform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Header fields that place voxels in the world."""
CODES = ((1, 0), (0, 2), (1, 1), (3, 4), (0, 0))
"""Of qform and sform."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a NIfTI puts its voxels, and how it says so."""

    affine: np.ndarray
    """(4, 4) voxel → mm."""
    codes: tuple[int, int]
    """Of qform and sform."""
    two: bool
    """NIfTI-2."""

    @property
    def kind(self) -> Any:
        """nibabel's class of images."""
        return nibabel.Nifti2Image if self.two else nibabel.Nifti1Image

    def save(self, array: np.ndarray, path: Path) -> Any:
        """Write `array` with this geometry and a patient's name; the image as it reads back."""
        header = self.kind(array, self.affine).header
        header.set_xyzt_units("mm", "sec")
        header.set_dim_info(0, 1, 2)
        header.set_qform(self.affine, self.codes[0])
        header.set_sform(self.affine, self.codes[1])
        header["descrip"] = b"Jane Doe"
        nibabel.save(self.kind(array, None, header), path)
        return nibabel.load(path)


def assert_labels_of(path: Path, source: Any) -> np.ndarray:
    """`path` holds uint8 labels in the very geometry of `source`, and no name; the labels."""
    written = nibabel.load(path)
    assert type(written) is type(source)
    assert written.get_data_dtype() == np.uint8
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert b"Jane" not in written.header.binaryblock
    np.testing.assert_array_equal(written.affine, source.affine)
    for name in FIELDS:
        np.testing.assert_array_equal(written.header[name], source.header[name])
    return np.asarray(written.dataobj)


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) about x, then y, then z, in radians."""
    x, y, z = angles
    rx = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return rx @ ry @ rz


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any orientation, spacing, flips, codes and version."""
    angles = draw(st.tuples(*[st.floats(-3, 3)] * 3))
    zooms = draw(st.tuples(*[st.sampled_from([0.4, 1.0, 3.3])] * 3))
    flips = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * zooms * flips
    affine[:3, 3] = draw(st.tuples(*[st.integers(-200, 200)] * 3))
    return Geometry(affine=affine, codes=draw(st.sampled_from(CODES)), two=draw(st.booleans()))


def voxels(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Any voxel of an array."""
    return st.tuples(*(st.integers(0, size - 1) for size in shape))
