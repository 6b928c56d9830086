"""The decoder's output upscaling: image tokens → pixels of the masks' features.

Each 2×2 transposed convolution is one GEMM per token, so that its norm runs over the last axis.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.reference import decoder as reference
from medsa_deploy.exporters.reference import efficient_sam

from .linear import linear
from .vit import layer_norm


class Upscaling(nn.Module):
    """SAM's output upscaling as GEMMs: each token becomes 4×4 pixels of 32 channels.

    A 2×2 transposed convolution of stride 2 is a linear map of each pixel to four.
    """

    def __init__(
        self, first: nn.ConvTranspose2d, norm: nn.Module, second: nn.ConvTranspose2d
    ) -> None:
        super().__init__()
        self.first, self.norm, self.second = _as_linear(first), norm, _as_linear(second)
        self.widths = (first.out_channels, second.out_channels)

    def forward(self, keys: Tensor) -> Tensor:
        """(B, g², 256) → (B, g² · 16, 32), in the order (token, 2, 2, 2, 2)."""
        x = self.first(keys).unflatten(-1, (4, self.widths[0]))
        x = self.second(F.gelu(self.norm(x))).unflatten(-1, (4, self.widths[1]))
        return F.gelu(x).flatten(1, 3)


class WholeNorm(nn.Module):
    """A group norm of one group with channels last: over everything, then scaled by channel."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) → (B, …, C)."""
        flat = x.flatten(1)
        return F.layer_norm(flat, flat.shape[1:], eps=self.eps).view_as(x) * self.weight + self.bias


def upscaling(decoder: reference.Decoder | efficient_sam.Decoder) -> Upscaling:
    """The output upscaling of SAM's decoder, or of EfficientSAM's."""
    if isinstance(decoder, reference.Decoder):
        first, norm, _, second, _ = decoder.output_upscaling
        return Upscaling(first, layer_norm(norm), second)
    (first, norm, _), (second, _) = decoder.final_output_upscaling_layers
    return Upscaling(first, WholeNorm(norm), second)


def _as_linear(conv: nn.ConvTranspose2d) -> nn.Linear:
    """A 2×2 transposed convolution of stride 2 as (in) → (2 · 2 · out), channels last."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert conv.bias is not None
    return linear(weight, conv.bias.repeat(4))
