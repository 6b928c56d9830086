"""The ViT encoder with its adapters folded in: image → embedding, in fewer operations.

Made from the reference encoder and equal to it: foldings 1 (MLP adapter), 2 (Space adapter),
5 (padded tokens), 6 (zero relative-position tables) and 7 (constants).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.reference import vit as reference
from medsa_deploy.exporters.sd_trans import closest_factors

from .attention import (
    DepthAttention,
    GridAttention,
    RelativePositionScores,
    Scores,
    folded_projections,
)
from .linear import composed, constant, linear, stacked, widened_mlp

SCORES = 2**28
"""Attention scores an encoder holds at a time: 1 GiB in float32."""


class AdaptedProjection(nn.Module):
    """Folding 2: output projection p and Space adapter p + fc2(GELU(fc1 p)), with one GEMM less.

    fc1 ∘ projection is linear, so [projection; fc1 ∘ projection] is one GEMM.
    """

    def __init__(self, projection: nn.Linear, fc1: nn.Linear, fc2: nn.Linear) -> None:
        super().__init__()
        self.wide = stacked(projection, composed(fc1, projection))
        self.fc2 = linear(fc2.weight, fc2.bias)
        self.widths = (projection.out_features, fc1.out_features)

    def forward(self, a: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        p, hidden = self.wide(a).split(self.widths, dim=-1)
        return p + self.fc2(F.gelu(hidden))


class Block(nn.Module):
    """One encoder block on tokens (B, H, W, C)."""

    def __init__(self, block: reference.Block, grid: int, slices: int) -> None:
        super().__init__()
        attention = block.attn
        padded = block.norm1.bias if block.adapted else 0 * block.norm1.bias
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
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """Patch embedding, blocks and neck; the token grid is fixed by the image size.

    `slices`: how many images are encoded together.
    """

    def __init__(self, encoder: reference.ImageEncoder, grid: int, slices: int = 1) -> None:
        super().__init__()
        self.patch_embed = encoder.patch_embed.proj
        self.positions = constant(encoder.positions((grid, grid)))
        self.blocks = nn.Sequential(*(Block(block, grid, slices) for block in encoder.blocks))
        self.neck = Neck(encoder.neck)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, g, g)."""
        x = self.patch_embed(image).permute(0, 2, 3, 1) + self.positions
        return self.neck(self.blocks(x))


class Neck(nn.Module):
    """SAM's neck from tokens; its norms run over the last axis, as LayerNormalization does."""

    def __init__(self, neck: nn.Sequential) -> None:
        super().__init__()
        narrow, norm1, conv, norm2 = neck
        self.narrow = linear(narrow.weight.flatten(1))
        self.norm1 = layer_norm(norm1)
        self.conv = conv
        self.norm2 = layer_norm(norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, 256, H, W)."""
        x = self.norm1(self.narrow(x))
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def layer_norm(norm: nn.Module) -> nn.LayerNorm:
    """SAM's LayerNorm2d as a LayerNorm over the last axis."""
    folded = nn.LayerNorm(len(norm.weight), eps=norm.eps)
    folded.weight, folded.bias = norm.weight, norm.bias
    return folded


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
