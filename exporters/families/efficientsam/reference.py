"""EfficientSAM's own encoder, as a checkpoint carries it; its decoder is `efficient_sam`'s."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.families.efficient_sam import reference as efficient_sam
from medsa_deploy.exporters.families.sam_vit import reference as sam_vit
from medsa_deploy.exporters.shapes import Shapes


class MLP(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    @property
    def lin1(self) -> nn.Linear:
        """The first layer, by the name that folding knows."""
        return self.fc1

    @property
    def lin2(self) -> nn.Linear:
        """The second layer, by the name that folding knows."""
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(sam_vit.Block):
    """SAM's block; its MLP's layers have other names."""

    @staticmethod
    def mlp_of(shapes: Shapes, prefix: str) -> nn.Module:
        """The MLP that a checkpoint holds under `prefix`."""
        hidden, width = shapes[f"{prefix}.fc1.weight"]
        return MLP(width, hidden)


class ImageEncoder(efficient_sam.ImageEncoder):
    """SAM's ViT; the table of positions has a class token before its 14×14."""

    EPS = 1e-6
    BLOCK = Block
