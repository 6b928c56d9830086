"""SAM-Med2D's encoder, folded: SAM's, with the adapter computed beside each MLP."""

from __future__ import annotations

from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.families.sam_vit import folded as sam_vit

from . import reference


class Block(sam_vit.Block):
    """SAM's block, folded, and the adapter on the whole map."""

    def __init__(self, block: reference.Block, grid: int, slices: int) -> None:
        super().__init__(block, grid, slices)
        self.adapter = block.Adapter

    def token_mlp(self, n: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        y = super().token_mlp(n)
        return y if self.adapter is None else y + self.adapter(n)


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT, folded, made of these blocks."""

    BLOCK = Block


def fold_encoder(encoder: reference.ImageEncoder, network: Network) -> nn.Module:
    """The folded encoder of a network."""
    return ImageEncoder(encoder, network.embedding_size)
