"""A picture → a volume of one slice, so that prompts in voxels fit it.

The volume has the shape (W, H, 1): its voxel (x, y, 0) is the pixel x, y.
"""

from __future__ import annotations

from dataclasses import dataclass

from .image import Image
from .volume import Volume


def picture_volume(image: Image) -> Volume:
    """A picture as a volume of one slice.

    >>> import numpy as np
    >>> from pathlib import Path
    >>> picture_volume(Image(pixels=np.zeros((30, 40), np.uint8), path=Path("a.png"))).shape
    (40, 30, 1)
    """
    height, width = image.pixels.shape[:2]
    return Volume(
        path=image.path,
        kind="npy",
        files=(image.path,),
        shape=(width, height, 1),
        axis=2,
        plane_axes=(1, 0),
        spacing_mm=(1.0, 1.0, 1.0),
        affine=None,
        dtype=image.pixels.dtype,
        colour=image.pixels.ndim == 3,
        inverted=image.inverted,
        rendered=image.display is not None,
        slices=_OneSlice(image=image),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _OneSlice:
    image: Image

    def read(self, index: int) -> Image:
        """The picture."""
        return self.image
