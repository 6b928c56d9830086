"""SAM's ViT encoder, folded: image → embedding, in fewer operations than the reference, and equal.

Foldings 1 (MLP adapter), 2 (Space adapter), 3 and 4 (SD-Trans), 5 (padded tokens), 6 (zero
relative-position tables) and 7 (constants).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.folded.adapters import AdaptedProjection, widened_mlp
from medsa_deploy.exporters.folded.attention import (
    GridAttention,
    RelativePositionScores,
    Scores,
    folded_projections,
)
from medsa_deploy.exporters.folded.linear import composed, constant, linear
from medsa_deploy.exporters.folded.neck import Neck
from medsa_deploy.exporters.folded.sd_trans import DepthAttention
from medsa_deploy.exporters.sd_trans import closest_factors

from . import reference

SCORES = 2**28
"""Attention scores an encoder holds at a time: 1 GiB in float32."""


class Block(nn.Module):
    """One encoder block on tokens (B, H, W, C)."""

    def __init__(self, block: reference.Block, grid: int, slices: int) -> None:
        super().__init__()
        attention = block.attn
        padded = block.norm1.bias if block.windows_first else 0 * block.norm1.bias
        query, key, value, projection = folded_projections(
            attention.qkv, attention.proj, padded, attention.scale
        )
        self.norm1 = block.norm1
        side = block.window or grid
        self.attention = GridAttention(
            query,
            key,
            value,
            heads=attention.num_heads,
            window=block.window,
            scores=_scores(attention, (side, side)),
            heads_at_once=_heads_at_once(attention.num_heads, block.window, grid, slices),
            depth=_depth(block, projection, grid),
        )
        space = block.Space_Adapter
        self.projection = (
            projection if space is None else AdaptedProjection(projection, space.D_fc1, space.D_fc2)
        )
        depth = block.Depth_Adapter
        self.depth_fc2 = None if depth is None else linear(depth.D_fc2.weight, depth.D_fc2.bias)
        self.norm2 = block.norm2
        self.mlp = widened_mlp(block.mlp.lin1, block.mlp.lin2, block.MLP_Adapter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        space, depth = self.attention(self.norm1(x))
        x = x + self.projection(space)
        if self.depth_fc2 is not None:
            x = x + self.depth_fc2(depth)
        return x + self.token_mlp(self.norm2(x))

    def token_mlp(self, n: Tensor) -> Tensor:
        """The MLP and its adapter on normalised tokens: (B, H, W, C) → (B, H, W, C)."""
        return self.mlp(n)


class ImageEncoder(nn.Module):
    """Patch embedding, blocks and neck; the token grid is fixed by the image size.

    `slices`: how many images are encoded together.
    """

    BLOCK: ClassVar[type[Block]] = Block

    def __init__(self, encoder: reference.ImageEncoder, grid: int, slices: int = 1) -> None:
        super().__init__()
        self.patch_embed = encoder.patch_embed.proj
        self.positions = constant(encoder.positions((grid, grid)))
        self.blocks = nn.Sequential(*(self.BLOCK(block, grid, slices) for block in encoder.blocks))
        self.neck = Neck(encoder.neck)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, g, g)."""
        x = self.patch_embed(image).permute(0, 2, 3, 1) + self.positions
        return self.neck(self.blocks(x))


def fold_encoder(encoder: reference.ImageEncoder, network: Network) -> ImageEncoder:
    """The folded encoder of a network."""
    return ImageEncoder(encoder, network.embedding_size, slices=network.chunk)


def _scores(attention: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """Folding 6: all-zero tables add nothing, exactly."""
    if not attention.use_rel_pos:
        return Scores()
    rows, columns = attention.rel_pos_h, attention.rel_pos_w
    if not (rows.any() or columns.any()):
        return Scores()
    return RelativePositionScores(rows, columns, grid, attention.scale)


def _heads_at_once(heads: int, window: int, grid: int, slices: int) -> int:
    """How many heads attend at a time, so that their scores fit in memory beside all others."""
    side = window or grid
    scores = slices * (-(-grid // side)) ** 2 * side**4
    return max(n for n in range(1, heads + 1) if n == 1 or n * scores <= SCORES)


def _depth(block: reference.Block, projection: nn.Linear, grid: int) -> DepthAttention | None:
    """SD-Trans's branch of a block; `projection` is the folded one, its bias included."""
    if block.sd_trans is None or block.Depth_Adapter is None:
        return None
    windows = (-(-grid // block.window)) ** 2 if block.window else 1
    d = block.sd_trans.size(windows)
    return DepthAttention(
        block.sd_trans,
        _scores(block.attn, closest_factors(d)),
        composed(block.Depth_Adapter.D_fc1, projection),
    )
