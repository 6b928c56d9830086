"""Affines as scanners and converters write them: anisotropic, oblique, flipped."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) about x, then y, then z, in radians."""
    x, y, z = angles
    rx = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return rx @ ry @ rz


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """(4, 4) voxel → mm."""
    angles = draw(st.tuples(*[st.floats(-3, 3)] * 3))
    zooms = draw(st.tuples(*[st.sampled_from([0.4, 1.0, 3.3])] * 3))
    flips = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * zooms * flips
    affine[:3, 3] = draw(st.tuples(*[st.integers(-200, 200)] * 3))
    return affine
