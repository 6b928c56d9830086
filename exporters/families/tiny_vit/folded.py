"""TinyViT, the encoder of mobile_sam and LiteMedSAM, folded: image → embedding.

Foldings 2 (Space adapter), 5 (padded tokens), 7 (attention biases gathered) and 10 (batch norms
merged). The MLP adapter stays by itself: it sees its input without the MLP's norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.folded.adapters import AdaptedProjection, widened_mlp
from medsa_deploy.exporters.folded.attention import (
    BiasedScores,
    GridAttention,
    folded_projections,
)
from medsa_deploy.exporters.folded.linear import linear, merged_norm
from medsa_deploy.exporters.folded.neck import Neck

from . import reference


class MBConv(nn.Module):
    """Inverted bottleneck."""

    def __init__(self, block: reference.MBConv) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = _merged(block)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(y))


class Downsample(nn.Module):
    """Change of width between stages."""

    def __init__(self, downsample: reference.Downsample) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = _merged(downsample)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Block(nn.Module):
    """Windowed attention, a depthwise convolution that replaces x, and an MLP."""

    def __init__(self, block: reference.Block, side: int) -> None:
        super().__init__()
        attention, space = block.attn, block.Space_Adapter
        query, key, value, projection = folded_projections(
            _rows_by_kind(attention.qkv, attention.heads),
            attention.proj,
            attention.norm.bias,
            (attention.proj.out_features // attention.heads) ** -0.5,
        )
        one_window = side == attention.window
        self.projection = (
            projection
            if space is None or one_window
            else AdaptedProjection(projection, space.D_fc1, space.D_fc2)
        )
        self.norm1 = attention.norm
        self.attention = GridAttention(
            query,
            key,
            value,
            heads=attention.heads,
            window=0 if one_window else attention.window,
            scores=BiasedScores(attention.bias()),
        )
        self.local_conv = merged_norm(block.local_conv.c, block.local_conv.bn)
        self.norm2 = block.mlp.norm
        self.mlp = widened_mlp(block.mlp.fc1, block.mlp.fc2, None)
        self.mlp_adapter = block.MLP_Adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        attended, _ = self.attention(self.norm1(x))
        x = x + self.projection(attended)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = x + self.mlp(self.norm2(x))
        return y if self.mlp_adapter is None else y + 0.5 * self.mlp_adapter(x)


class ImageEncoder(nn.Module):
    """Convolutions, windowed stages and neck."""

    def __init__(self, encoder: reference.ImageEncoder, image_size: int) -> None:
        super().__init__()
        first, act, second = encoder.patch_embed.seq
        stages: list[nn.Module] = [merged_norm(first.c, first.bn), act]
        stages.append(merged_norm(second.c, second.bn))
        side = image_size // (first.c.stride[0] * second.c.stride[0])
        for stage in encoder.layers:
            if stage.convolutional:
                stages += [MBConv(block) for block in stage.blocks]
            else:
                blocks = [Block(block, side) for block in stage.blocks]
                stages += [ChannelsLast(), *blocks, ChannelsFirst()]
            if stage.downsample is not None:
                stages.append(Downsample(stage.downsample))
                side = -(-side // stage.downsample.conv2.c.stride[0])
        self.stages = nn.Sequential(*stages)
        self.neck = Neck(encoder.neck)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, S/4, S/4)."""
        return self.neck(self.stages(image).permute(0, 2, 3, 1))


class ChannelsLast(nn.Module):
    """(B, C, H, W) → (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """(B, H, W, C) → (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, 3, 1, 2)


def fold_encoder(encoder: reference.ImageEncoder, network: Network) -> ImageEncoder:
    """The folded encoder of a network."""
    return ImageEncoder(encoder, network.image_size)


def _merged(module: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
    """Three convolutions with their batch norms merged."""
    c1, c2, c3 = (merged_norm(c.c, c.bn) for c in (module.conv1, module.conv2, module.conv3))
    return c1, c2, c3


def _rows_by_kind(qkv: nn.Linear, heads: int) -> nn.Linear:
    """Rows grouped per head (head, q|k|v, d) → rows of all q, all k, all v."""
    order = torch.arange(qkv.out_features).view(heads, 3, -1).transpose(0, 1).flatten()
    return linear(qkv.weight[order], qkv.bias[order])
