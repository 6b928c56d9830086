"""A checkpoint's tensors → its reference network → the folded network that is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network

from .families.registry import family_named
from .folded.decoder import Decoder
from .folded.split import ClickPart, ImagePart
from .reference import ReferenceNetwork
from .shapes import Shapes


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


def build_reference(network: Network, tensors: Mapping[str, Tensor]) -> ReferenceNetwork:
    """The reference network holding a checkpoint's weights, in float32, for inference."""
    shapes = Shapes({key: tuple(value.shape) for key, value in tensors.items()})
    with torch.device("meta"):
        reference = family_named(network.family).reference(network, shapes)
    used = {key for key in reference.state_dict() if not key.endswith("num_batches_tracked")}
    reference.load_state_dict({key: tensors[key] for key in used}, strict=False, assign=True)
    return reference.eval().requires_grad_(False)


@torch.no_grad()
def fold(reference: ReferenceNetwork) -> FoldedNetwork:
    """The same function in fewer operations. The reference is left as it is."""
    network = reference.network
    family = family_named(network.family)
    layers = family.decoder.layers(reference.prompt_encoder, reference.mask_decoder)
    decoder = Decoder(layers, family.leaving(network)).eval()
    return FoldedNetwork(
        encoder=family.fold_encoder(reference.encoder, network).eval(),
        decoder=decoder,
        image_part=ImagePart(decoder).eval(),
        click_part=ClickPart(decoder).eval(),
    )
