"""finetune-SAM's encoder, as a checkpoint carries it: every block cuts windows before its norm."""

from __future__ import annotations

from medsa_deploy.exporters.families.sam_vit import reference as sam_vit


class Block(sam_vit.Block):
    """Med-SA's block, with adapters or without."""

    @property
    def windows_first(self) -> bool:
        """Always, so that padded tokens enter attention as norm1(0)."""
        return True


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT made of these blocks."""

    BLOCK = Block
