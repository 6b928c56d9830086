"""SAM-Med2D's encoder, folded: SAM's, with the adapter computed beside each MLP.

The adapter's gate depends on the image, so nothing of it is a constant. Its two convolutions are
GEMMs on gathered tokens with channels last: no token changes its layout, and a transposed
convolution is one GEMM for each of the four pixels that a token becomes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.families.sam_vit import folded as sam_vit
from medsa_deploy.exporters.folded.linear import linear

from . import reference

Places = list[tuple[int, int]]
"""Rows and columns of tokens."""


class GatheredLinear(nn.Module):
    """A linear map of all the tokens that an output reads, for every output.

    `reads`: the tokens of each output; beyond the grid there are zeros. `weight`: (out, in, number
    of tokens that an output reads).
    """

    indices: Tensor

    def __init__(self, reads: list[Places], grid: int, weight: Tensor) -> None:
        super().__init__()
        inside, zero = range(grid), grid * grid
        tokens = [
            row * grid + column if row in inside and column in inside else zero
            for places in reads
            for row, column in places
        ]
        self.register_buffer("indices", torch.tensor(tokens))
        self.outputs = len(reads)
        self.linear = linear(weight.transpose(1, 2).flatten(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, grid² + 1, C), the last of them zero → (B, outputs, out)."""
        read = tokens.index_select(1, self.indices)
        return self.linear(read.reshape(-1, self.outputs, self.linear.in_features))


class Adapter(nn.Module):
    """SAM-Med2D's adapter on a grid of an even side."""

    def __init__(self, adapter: reference.Adapter, grid: int) -> None:
        super().__init__()
        down, _, up, _ = adapter.spatial
        self.channel, self.norm = adapter.channel, adapter.norm
        self.half = half = grid // 2
        cells = [(i, j) for i in range(half) for j in range(half)]
        nine = [[(2 * i + r - 1, 2 * j + c - 1) for r in range(3) for c in range(3)]
                for i, j in cells]  # fmt: skip
        self.down = GatheredLinear(nine, grid, down.weight.flatten(2))
        # Row 2i + a of the output reads rows i + a − 1 and i + a of the input, through rows 3 − a
        # and 1 − a of the kernel; columns likewise.
        self.up = nn.ModuleList()
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            four = [[(i + r, j + c) for r in (a - 1, a) for c in (b - 1, b)] for i, j in cells]
            kernel = up.weight[:, :, [3 - a, 1 - a]][..., [3 - b, 1 - b]]
            self.up.append(GatheredLinear(four, half, kernel.flatten(2).transpose(0, 1)))

    def forward(self, n: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        gate = self.channel(n.mean(dim=(1, 2)))
        y = F.relu(self.down(_with_zeros(n.flatten(1, 2) * gate[:, None])))
        tokens = _with_zeros(y)
        pixels = torch.stack([part(tokens) for part in self.up], dim=2)
        pixels = pixels.unflatten(2, (2, 2)).unflatten(1, (self.half, self.half))
        return self.norm(n + F.relu(pixels.permute(0, 1, 3, 2, 4, 5).reshape(n.shape)))


class Block(sam_vit.Block):
    """SAM's block, folded, and the adapter on the whole map."""

    def __init__(self, block: reference.Block, grid: int, slices: int) -> None:
        super().__init__(block, grid, slices)
        self.adapter = None if block.Adapter is None else Adapter(block.Adapter, grid)

    def token_mlp(self, n: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        y = super().token_mlp(n)
        return y if self.adapter is None else y + self.adapter(n)


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT, folded, made of these blocks."""

    BLOCK = Block


def fold_encoder(encoder: reference.ImageEncoder, network: Network) -> nn.Module:
    """The folded encoder of a network."""
    return ImageEncoder(encoder, network.embedding_size)


def _with_zeros(tokens: Tensor) -> Tensor:
    """(B, T, C) → (B, T + 1, C), the last token zero."""
    return F.pad(tokens, (0, 0, 0, 1))
