"""TinyViT, the encoder of mobile_sam and LiteMedSAM, as a checkpoint carries it: image → embedding.

Convolutional stage, then three stages of windowed attention; every convolution is followed by a
batch norm. The keys of a checkpoint name the modules here.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.adapters import adapter
from medsa_deploy.exporters.reference.neck import neck
from medsa_deploy.exporters.sam import window_partition, window_unpartition
from medsa_deploy.exporters.shapes import Shapes


class ConvNorm(nn.Module):
    """Convolution `c` without bias, padded to keep the size, then batch norm `bn`."""

    def __init__(self, shapes: Shapes, prefix: str, *, stride: int = 1) -> None:
        super().__init__()
        out, inner, kernel, _ = shapes[f"{prefix}.c.weight"]
        depthwise = inner == 1 and kernel > 1
        self.c = nn.Conv2d(
            out if depthwise else inner,
            out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=out if depthwise else 1,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        return self.bn(self.c(x))


class PatchEmbed(nn.Module):
    """Two convolutions with a GELU between: 3×3 of stride 2, or LiteMedSAM's 1×1 of stride 1."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        stride = 2 if shapes[f"{prefix}.seq.0.c.weight"][2] == 3 else 1
        self.seq = nn.Sequential(
            ConvNorm(shapes, f"{prefix}.seq.0", stride=stride),
            nn.GELU(),
            ConvNorm(shapes, f"{prefix}.seq.2", stride=stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C, H, W)."""
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck: widen, depthwise, narrow, with a residual before the last GELU."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(shapes, f"{prefix}.conv1")
        self.conv2 = ConvNorm(shapes, f"{prefix}.conv2")
        self.conv3 = ConvNorm(shapes, f"{prefix}.conv3")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(y))


class Downsample(nn.Module):
    """Change of width between stages; the last one keeps the resolution."""

    def __init__(self, shapes: Shapes, prefix: str, *, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(shapes, f"{prefix}.conv1")
        self.conv2 = ConvNorm(shapes, f"{prefix}.conv2", stride=stride)
        self.conv3 = ConvNorm(shapes, f"{prefix}.conv3")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Attention(nn.Module):
    """Attention inside a window, biased by the distance between tokens; the norm is inside."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        width = shapes[f"{prefix}.norm.weight"][0]
        self.heads, offsets = shapes[f"{prefix}.attention_biases"]
        self.window = isqrt(offsets)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.empty(self.heads, offsets))

    def bias(self) -> Tensor:
        """Bias of every pair of tokens: (heads, n², n²), from the table of |Δrow|·n + |Δcolumn|."""
        n = self.window
        row, column = torch.arange(n * n) // n, torch.arange(n * n) % n
        rows = (row[:, None] - row[None, :]).abs()
        columns = (column[:, None] - column[None, :]).abs()
        return self.attention_biases[:, rows * n + columns]

    def forward(self, x: Tensor) -> Tensor:
        """(M, n, n, C) → (M, n, n, C)."""
        qkv = self.qkv(self.norm(x).flatten(1, 2)).unflatten(-1, (self.heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        scores = q.shape[-1] ** -0.5 * (q @ k.transpose(-2, -1)) + self.bias()
        y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2)).view(x.shape)


class MLP(nn.Module):
    """fc2(GELU(fc1(norm(x))))."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        hidden, width = shapes[f"{prefix}.fc1.weight"]
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    """Windowed attention, a depthwise convolution that replaces x, and an MLP."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        self.attn = Attention(shapes, f"{prefix}.attn")
        self.Space_Adapter = adapter(shapes, f"{prefix}.Space_Adapter", skip=True)
        self.local_conv = ConvNorm(shapes, f"{prefix}.local_conv")
        self.mlp = MLP(shapes, f"{prefix}.mlp")
        self.MLP_Adapter = adapter(shapes, f"{prefix}.MLP_Adapter", skip=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C). Padded tokens enter attention as zeros before its norm."""
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.mlp(x)
        if self.MLP_Adapter is not None:
            y = y + 0.5 * self.MLP_Adapter(x)  # which sees x without the MLP's norm
        return x + y

    def _attend(self, x: Tensor) -> Tensor:
        """In windows, adapted; a map that is one window has no Space adapter."""
        side = self.attn.window
        if x.shape[1:3] == (side, side):
            return self.attn(x)
        windows, padded = window_partition(x, side)
        y = self.attn(windows)
        if self.Space_Adapter is not None:
            y = self.Space_Adapter(y)
        return window_unpartition(y, side, padded, x.shape[1:3])


class Stage(nn.Module):
    """Blocks of one resolution, then the change to the next width."""

    def __init__(self, shapes: Shapes, prefix: str, *, stride: int | None) -> None:
        super().__init__()
        count = shapes.count(f"{prefix}.blocks")
        self.convolutional = f"{prefix}.blocks.0.conv1.c.weight" in shapes
        block = MBConv if self.convolutional else Block
        self.blocks = nn.ModuleList(block(shapes, f"{prefix}.blocks.{i}") for i in range(count))
        self.downsample = (
            None if stride is None else Downsample(shapes, f"{prefix}.downsample", stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        if not self.convolutional:
            x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        if not self.convolutional:
            x = x.permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class ImageEncoder(nn.Module):
    """TinyViT with SAM's neck; the embedding has side S/16, LiteMedSAM's S/4."""

    STRIDES = (2, 2, 1, None)

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        prefix = "image_encoder"
        self.patch_embed = PatchEmbed(shapes, f"{prefix}.patch_embed")
        self.layers = nn.ModuleList(
            Stage(shapes, f"{prefix}.layers.{i}", stride=stride)
            for i, stride in enumerate(self.STRIDES)
        )
        out, width, *_ = shapes[f"{prefix}.neck.0.weight"]
        self.neck = neck(width, out)

    @classmethod
    def of(cls, network: Network, shapes: Shapes) -> ImageEncoder:
        """The encoder of a network, without weights; shapes alone determine it."""
        return cls(shapes)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, g, g)."""
        x = self.patch_embed(image)
        for stage in self.layers:
            x = stage(x)
        return self.neck(x)
