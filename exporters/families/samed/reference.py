"""SAMed's encoder: SAM's ViT whose table of positions is resized bilinearly to the image size."""

from __future__ import annotations

from medsa_deploy.exporters.families.sam_vit import reference as sam_vit


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT; the tables of relative positions are resized linearly, as SAM does."""

    RESIZE = "bilinear"
