"""A kind of decoder: its keys, its reference modules and their layers. SAM's is here.

Families share SAM's decoder; one with another decoder describes it in its own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medsa_deploy.bundle.manifest import Network, TwoWay

from .folded.decoder import LABELS, DecoderLayers, DensePrompts
from .folded.linear import layer_norm
from .folded.upscaling import Upscaling
from .reference import decoder as sam
from .shapes import Shapes

STEMS = ("prompt_encoder.", "mask_decoder.")
"""Beginnings of keys that every decoder here has."""

TRANSFORMER = {
    "mask_decoder.mask_tokens.weight": "* 256",
    "mask_decoder.transformer.layers.#.self_attn.q_proj.weight": "* 256",
    "mask_decoder.transformer.layers.#.cross_attn_token_to_image.q_proj.weight": "* 256",
    "mask_decoder.transformer.layers.#.cross_attn_image_to_token.q_proj.weight": "* 256",
    "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight": "* 256",
    "mask_decoder.transformer.norm_final_attn.weight": "256",
}
TWO_WAY_MLP: Mapping[TwoWay, Mapping[str, str]] = {
    "meta": {"mask_decoder.transformer.layers.#.mlp.lin1.weight": "* 256"},
    "public": {"mask_decoder.transformer.layers.#.mlp.layers.0.0.weight": "* 256"},
}
ADAPTERS = {
    "mask_decoder.transformer.layers.#.HyP_Adapter.D_fc1.weight": "* 256",
    "mask_decoder.transformer.layers.#.HyP_Adapter.P_fc.weight": "* 256",
    "mask_decoder.transformer.layers.#.HyP_Adapter.norms.#.weight": "*",
    "mask_decoder.transformer.layers.#.MLP_Adapter.D_fc1.weight": "* 256",
    "mask_decoder.transformer.layers.#.Image_Adapter.D_fc1.weight": "* 256",
    "mask_decoder.transformer.layers.#.Adapter.D_fc1.weight": "* 256",
}
"""Keys that a decoder may have."""


@dataclass(frozen=True, kw_only=True)
class DecoderKind:
    """Everything that the exporters ask about a kind of decoder."""

    required_keys: Mapping[str, str]
    """Its keys besides those of the two-way blocks' MLPs, with their shapes (`key_check.py`)."""
    two_way: Callable[[Shapes], TwoWay]
    """Form of the two-way blocks."""
    takes_masks: bool
    """Whether it takes mask prompts."""
    reference: Callable[[Network, Shapes], tuple[nn.Module, nn.Module]]
    """Prompt encoder and mask decoder, without weights."""
    layers: Callable[[Any, Any], DecoderLayers]
    """Prompt encoder and mask decoder → their layers, for folding."""


def mask_tokens(shapes: Shapes) -> int:
    """How many mask tokens a decoder has; 0 if it shows none."""
    return next(iter(shapes.get("mask_decoder.mask_tokens.weight") or ()), 0)


def two_way_by_keys(shapes: Shapes) -> TwoWay:
    """The form that the keys of a two-way block's MLP show."""
    prefix, public = "mask_decoder.transformer", ".mlp.layers.0.0."
    return "public" if any(k.startswith(prefix) and public in k for k in shapes) else "meta"


def sam_layers(prompts: sam.PromptTokens, decoder: sam.Decoder) -> DecoderLayers:
    """The layers of SAM's decoder; a padding point has no positional encoding."""
    embeddings = [prompts.not_a_point_embed, *prompts.point_embeddings]
    first, norm, _, second, _ = decoder.output_upscaling
    return DecoderLayers(
        frequencies=prompts.pe_layer.positional_encoding_gaussian_matrix,
        image_size=prompts.input_image_size[0],
        label_embeddings=dict(zip(LABELS, (e.weight for e in embeddings), strict=True)),
        unplaced_labels=(-1,),
        image_pe=prompts.get_dense_pe(),
        mask_prompts=DensePrompts(prompts),
        output_tokens=torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]),
        transformer=decoder.transformer,
        upscaling=Upscaling(first, layer_norm(norm), second),
        mask_mlps=[list(mlp.layers) for mlp in decoder.output_hypernetworks_mlps],
        iou_mlp=list(decoder.iou_prediction_head.layers),
        act=nn.ReLU(),
    )


SAM_DECODER = DecoderKind(
    required_keys={
        "prompt_encoder.mask_downscaling.3.weight": "* * 2 2",
        "prompt_encoder.no_mask_embed.weight": "1 256",
        "mask_decoder.iou_prediction_head.layers.0.weight": "* 256",
    }
    | TRANSFORMER,
    two_way=two_way_by_keys,
    takes_masks=True,
    reference=sam.prompts_and_decoder,
    layers=sam_layers,
)
