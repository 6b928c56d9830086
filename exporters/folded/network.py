"""fold: the reference network → the encoder and decoder that are exported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from medsa_deploy.exporters.reference import ReferenceNetwork
from medsa_deploy.exporters.reference import tiny_vit as reference_tiny_vit

from . import tiny_vit, vit
from .decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class FoldedNetwork:
    """The two graphs of a bundle, as modules."""

    encoder: nn.Module
    """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
    decoder: nn.Module
    """See `folded.decoder.Decoder`."""


@torch.no_grad()
def fold(reference: ReferenceNetwork) -> FoldedNetwork:
    """The same function in fewer operations. The reference is left as it is."""
    encoder = reference.image_encoder
    return FoldedNetwork(
        encoder=(
            tiny_vit.ImageEncoder(encoder, reference.network.image_size)
            if isinstance(encoder, reference_tiny_vit.ImageEncoder)
            else vit.ImageEncoder(
                encoder, reference.network.embedding_size, slices=reference.network.chunk
            )
        ).eval(),
        decoder=Decoder(
            reference.prompt_encoder, reference.mask_decoder, reference.network.masks
        ).eval(),
    )
