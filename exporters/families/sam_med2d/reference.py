"""SAM-Med2D's encoder, as a checkpoint carries it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medsa_deploy.exporters.families.sam_vit import reference as sam_vit
from medsa_deploy.exporters.shapes import Shapes


class Adapter(nn.Module):
    """Channels weighted by the whole map, then a residual step over space."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, n: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        weights = self.channel(n.mean(dim=(1, 2)))[:, None, None]
        y = self.spatial((weights * n).permute(0, 3, 1, 2))
        return self.norm(n + y.permute(0, 2, 3, 1))


class Block(sam_vit.Block):
    """SAM's block with an adapter beside its MLP."""

    def __init__(self, shapes: Shapes, prefix: str, *, width: int, **facts: Any) -> None:
        super().__init__(shapes, prefix, width=width, **facts)
        gate = shapes.get(f"{prefix}.Adapter.channel.0.weight")
        self.Adapter = None if gate is None else Adapter(width, gate[0])

    def token_mlp(self, n: Tensor) -> Tensor:
        """The MLP, and the adapter on the whole map: (B, H, W, C) → (B, H, W, C)."""
        y = super().token_mlp(n)
        return y if self.Adapter is None else y + self.Adapter(n)


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT made of these blocks."""

    BLOCK = Block
