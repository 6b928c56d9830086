"""SAM's ViT encoder with Med-SA's adapters, as a checkpoint carries it: image → embedding.

Exported graphs are compared with this network, so it follows the published equations step by step
and saves nothing.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.adapters import adapter
from medsa_deploy.exporters.reference.neck import neck
from medsa_deploy.exporters.sam import (
    Attention,
    MLPBlock,
    PatchEmbed,
    window_partition,
    window_unpartition,
)
from medsa_deploy.exporters.sd_trans import SDTrans, closest_factors
from medsa_deploy.exporters.shapes import Shapes

SCORES = 2**28
"""Attention scores the reference holds at a time."""


class Block(nn.Module):
    """One encoder block on tokens (B, H, W, C); `window` 0 attends over the whole grid.

    Without adapters this is SAM's block: norm1 first, so padded tokens enter attention as zeros.
    With adapters (section 3.2) windows are cut first, so padded tokens enter as norm1(0). With
    `sd_trans` (section 3.3) B counts slices, and the same attention also runs over depth.
    """

    def __init__(
        self,
        shapes: Shapes,
        prefix: str,
        *,
        width: int,
        heads: int,
        window: int,
        sd_trans: SDTrans | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _attention(shapes, f"{prefix}.attn", width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = self.mlp_of(shapes, f"{prefix}.mlp")
        self.Space_Adapter = adapter(shapes, f"{prefix}.Space_Adapter", skip=True)
        self.MLP_Adapter = adapter(shapes, f"{prefix}.MLP_Adapter", skip=False)
        self.Depth_Adapter = (
            None if sd_trans is None else adapter(shapes, f"{prefix}.Depth_Adapter", skip=False)
        )
        self.sd_trans = sd_trans
        self.window = window

    @staticmethod
    def mlp_of(shapes: Shapes, prefix: str) -> nn.Module:
        """The MLP that a checkpoint holds under `prefix`."""
        hidden, width = shapes[f"{prefix}.lin1.weight"]
        return MLPBlock(width, hidden)

    @property
    def windows_first(self) -> bool:
        """Whether windows are cut before norm1: Med-SA's order rather than SAM's."""
        return self.Space_Adapter is not None or self.MLP_Adapter is not None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        x = x + (self._space_of_windows(x) if self.windows_first else self._space(x))
        return x + self.token_mlp(self.norm2(x))

    def token_mlp(self, n: Tensor) -> Tensor:
        """The MLP and its adapter on normalised tokens: (B, H, W, C) → (B, H, W, C)."""
        y = self.mlp(n)
        return y if self.MLP_Adapter is None else y + 0.5 * self.MLP_Adapter(n)

    def _space(self, x: Tensor) -> Tensor:
        """SAM: norm, cut into windows, attend."""
        n = self.norm1(x)
        if not self.window:
            return self._attend(n)
        windows, padded = window_partition(n, self.window)
        return window_unpartition(self._attend(windows), self.window, padded, x.shape[1:3])

    def _space_of_windows(self, x: Tensor) -> Tensor:
        """Med-SA: cut into windows, norm, attend, adapt; and attend over depth."""
        windows, padded = window_partition(x, self.window) if self.window else (x, None)
        y = self._attend(self.norm1(windows))
        if self.Space_Adapter is not None:
            y = self.Space_Adapter(y)
        if self.sd_trans is not None:
            y = y + self._depth(windows, self.sd_trans, len(windows) // len(x))
        return window_unpartition(y, self.window, padded, x.shape[1:3]) if self.window else y

    def _depth(self, x: Tensor, sd_trans: SDTrans, windows: int) -> Tensor:
        """SD-Trans on (M, h, w, C): the block's own attention over d slices, then its adapter."""
        d = sd_trans.size(windows)
        groups = sd_trans.group(x.flatten(1, 2), windows)
        n = self.norm1(groups).reshape(-1, *closest_factors(d), x.shape[-1])
        y = self.attn(n).view(groups.shape)
        if self.Depth_Adapter is not None:
            y = self.Depth_Adapter(y)
        return sd_trans.ungroup(y, windows).view(x.shape)

    def _attend(self, n: Tensor) -> Tensor:
        """Attention, a few entries at a time: all scores of many slices would not fit in memory."""
        scores = self.attn.num_heads * (n.shape[1] * n.shape[2]) ** 2
        return torch.cat([self.attn(part) for part in n.split(max(1, SCORES // scores))])


class ImageEncoder(nn.Module):
    """Patch embedding, blocks and neck."""

    EPS = 1e-6
    """Of the blocks' norms."""
    BLOCK: ClassVar[type[Block]] = Block
    RESIZE = "bicubic"
    """Interpolation of the table of positions."""

    def __init__(
        self,
        shapes: Shapes,
        *,
        heads: int,
        window: int,
        global_blocks: tuple[int, ...],
        sd_trans: SDTrans | None = None,
    ) -> None:
        super().__init__()
        prefix = "image_encoder"
        width, channels, *patch = shapes[f"{prefix}.patch_embed.proj.weight"]
        self.patch_embed = PatchEmbed(
            tuple(patch), tuple(patch), in_chans=channels, embed_dim=width
        )
        self.pos_embed = nn.Parameter(torch.empty(shapes[f"{prefix}.pos_embed"]))
        self.blocks = nn.ModuleList(
            self.BLOCK(
                shapes,
                f"{prefix}.blocks.{i}",
                width=width,
                heads=heads,
                window=0 if i in global_blocks else window,
                sd_trans=sd_trans,
                eps=self.EPS,
            )
            for i in range(shapes.count(f"{prefix}.blocks"))
        )
        self.neck = neck(width, shapes[f"{prefix}.neck.0.weight"][0])

    @classmethod
    def of(cls, network: Network, shapes: Shapes) -> ImageEncoder:
        """The encoder of a network, without weights."""
        return cls(
            shapes,
            heads=network.heads[0],
            window=network.windows[0],
            global_blocks=network.global_blocks,
            sd_trans=SDTrans.of(network),
        )

    def position_table(self) -> Tensor:
        """`pos_embed` as a grid: (1, 64, 64, C)."""
        return self.pos_embed

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table resized to the token grid: (1, H, W, C)."""
        channels_first = self.position_table().permute(0, 3, 1, 2)
        if channels_first.shape[2:] != grid:
            channels_first = F.interpolate(
                channels_first, grid, mode=self.RESIZE, align_corners=False
            )
        return channels_first.permute(0, 2, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, g, g)."""
        x = self.patch_embed(image)
        x = x + self.positions(x.shape[1:3])
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def _attention(shapes: Shapes, prefix: str, width: int, heads: int) -> Attention:
    """SAM's attention, with relative-position tables of the length the checkpoint has."""
    attention = Attention(width, num_heads=heads)
    if f"{prefix}.rel_pos_h" in shapes:
        attention.use_rel_pos = True
        attention.rel_pos_h = nn.Parameter(torch.empty(shapes[f"{prefix}.rel_pos_h"]))
        attention.rel_pos_w = nn.Parameter(torch.empty(shapes[f"{prefix}.rel_pos_w"]))
    return attention
