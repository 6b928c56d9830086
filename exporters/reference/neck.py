"""SAM's neck, which every encoder here ends with: tokens of any width → the image embedding."""

from __future__ import annotations

from torch import nn

from medsa_deploy.exporters.sam import LayerNorm2d


def neck(width: int, out: int) -> nn.Sequential:
    """SAM's neck on (B, C, g, g): 1×1 convolution, norm, 3×3 convolution, norm."""
    return nn.Sequential(
        nn.Conv2d(width, out, kernel_size=1, bias=False),
        LayerNorm2d(out),
        nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out),
    )
