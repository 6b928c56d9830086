"""SD-Trans (section 3.3 of the paper): which tokens attend to each other over depth.

Besides its space branch, an encoder block attends over groups of d tokens at one position of d
slices, the d tokens laid out as a grid. How groups are formed was decided by training: the public
code reshapes literally, so in windowed blocks a group takes d consecutive windows, of one or two
slices; `paper` takes the same window of d slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from medsa_deploy.bundle.manifest import DepthGrouping, Network


@dataclass(frozen=True, kw_only=True)
class SDTrans:
    """How the depth branch groups what its block sees."""

    grouping: DepthGrouping
    chunk: int | None
    """d; None: one group spans every slice and window of the block, and `slices` is fixed."""
    slices: int | None = None
    """The exact number of slices the encoder takes, if there is no chunk."""

    @classmethod
    def of(cls, network: Network) -> SDTrans | None:
        """A network's; None if it sees single images."""
        if network.sd_trans is None:
            return None
        return cls(grouping=network.sd_trans, chunk=network.depth_chunk, slices=network.slices)

    def size(self, windows: int) -> int:
        """d, in a block that cuts each slice into `windows` windows."""
        return self.chunk or (self.slices or 0) * windows

    def group(self, x: Tensor, windows: int) -> Tensor:
        """(M, …, n, C) → (M/d, …, n, d, C): position by position over depth.

        M counts slices times `windows` windows each, the window index fastest; … is whatever
        stands between, such as heads. `ungroup` with the same arguments is the inverse.
        """
        d = self.size(windows)
        if self.grouping == "paper" and self.chunk is not None:
            x = x.unflatten(0, (-1, d, windows)).transpose(1, 2).flatten(0, 1)
        else:
            x = x.unflatten(0, (-1, d))
        return x.movedim(1, -2)

    def ungroup(self, x: Tensor, windows: int) -> Tensor:
        """(M/d, …, n, d, C) → (M, …, n, C)."""
        x = x.movedim(-2, 1)
        if self.grouping == "paper" and self.chunk is not None:
            x = x.unflatten(0, (-1, windows)).transpose(1, 2).flatten(0, 1)
        return x.flatten(0, 1)


def closest_factors(d: int) -> tuple[int, int]:
    """The two factors of d nearest to its square root, as the public code finds them.

    6 → 2×3, 8 → 2×4, 4 → 1×4, 9 → 1×9, 16 → 2×8: it starts one above the root, so for 1 it would
    search for ever.
    """
    if d == 1:
        return 1, 1
    a = isqrt(d)
    b = a + 1
    while a * b != d:
        if a * b < d:
            b += 1
        else:
            a -= 1
    return a, b
