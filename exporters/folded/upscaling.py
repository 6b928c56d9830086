"""The decoder's output upscaling: image tokens → pixels of the masks' features.

Each 2×2 transposed convolution is one GEMM per token, so that its norm runs over the last axis.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .linear import linear


class Upscaling(nn.Module):
    """SAM's output upscaling as GEMMs: each token becomes 4×4 pixels of 32 channels.

    A 2×2 transposed convolution of stride 2 is a linear map of each pixel to four. `norm` runs
    between the two, with channels last.
    """

    def __init__(
        self, first: nn.ConvTranspose2d, norm: nn.Module, second: nn.ConvTranspose2d
    ) -> None:
        super().__init__()
        self.first, self.norm, self.second = _as_linear(first), norm, _as_linear(second)
        self.widths = (first.out_channels, second.out_channels)

    def forward(self, keys: Tensor) -> Tensor:
        """(B, g², 256) → (B, g² · 16, 32), in the order (token, 2, 2, 2, 2)."""
        # Three axes throughout, because runtimes fuse bias and GELU, and norms, only there.
        batch = keys.shape[0]
        x = self.first(keys).reshape(batch, -1, self.widths[0])
        x = F.gelu(self.second(F.gelu(self.norm(x))))
        return x.reshape(batch, -1, self.widths[1])


def _as_linear(conv: nn.ConvTranspose2d) -> nn.Linear:
    """A 2×2 transposed convolution of stride 2 as (in) → (2 · 2 · out), channels last."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert conv.bias is not None
    return linear(weight, conv.bias.repeat(4))
