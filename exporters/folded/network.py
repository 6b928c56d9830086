"""fold: the reference network → the encoder and the decoder, whole and in parts, for export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from medsa_deploy.exporters.reference import ReferenceNetwork
from medsa_deploy.exporters.reference import tiny_vit as reference_tiny_vit

from . import tiny_vit, vit
from .decoder import Decoder
from .split import ClickPart, ImagePart


@dataclass(frozen=True, kw_only=True)
class FoldedNetwork:
    """The graphs of a bundle, as modules."""

    encoder: nn.Module
    """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
    decoder: nn.Module
    """See `folded.decoder.Decoder`."""
    image_part: ImagePart
    click_part: ClickPart
    """The decoder once more, for prompts without a mask. See `folded.split`."""


@torch.no_grad()
def fold(reference: ReferenceNetwork) -> FoldedNetwork:
    """The same function in fewer operations. The reference is left as it is."""
    encoder = reference.image_encoder
    decoder = Decoder(
        reference.prompt_encoder, reference.mask_decoder, reference.network.masks
    ).eval()
    return FoldedNetwork(
        encoder=(
            tiny_vit.ImageEncoder(encoder, reference.network.image_size)
            if isinstance(encoder, reference_tiny_vit.ImageEncoder)
            else vit.ImageEncoder(
                encoder, reference.network.embedding_size, slices=reference.network.chunk
            )
        ).eval(),
        decoder=decoder,
        image_part=ImagePart(decoder).eval(),
        click_part=ClickPart(decoder).eval(),
    )
