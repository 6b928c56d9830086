"""SAM's neck, folded: tokens of any encoder → the image embedding."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import layer_norm, linear


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
