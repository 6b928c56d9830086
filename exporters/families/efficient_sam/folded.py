"""The layers of EfficientSAM's decoder, as folding takes them; its encoder is folded as SAM's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.folded.decoder import DecoderLayers
from medsa_deploy.exporters.folded.upscaling import Upscaling

from . import reference


class WholeNorm(nn.Module):
    """A group norm of one group with channels last: over everything, then scaled by channel."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) → (B, …, C)."""
        flat = x.flatten(1)
        return F.layer_norm(flat, flat.shape[1:], eps=self.eps).view_as(x) * self.weight + self.bias


def decoder_layers(prompts: reference.PromptTokens, decoder: reference.Decoder) -> DecoderLayers:
    """There is no mask prompt, and a point of any label has a positional encoding."""
    layers: Any = decoder.final_output_upscaling_layers
    (first, norm, _), (second, _) = layers
    return DecoderLayers(
        frequencies=prompts.pe_layer.positional_encoding_gaussian_matrix,
        image_size=prompts.image_size,
        label_embeddings=prompts.kinds(),
        unplaced_labels=(),
        image_pe=prompts.get_dense_pe(),
        mask_prompts=None,
        output_tokens=torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]),
        transformer=decoder.transformer,
        upscaling=Upscaling(first, WholeNorm(norm), second),
        mask_mlps=[_linear_layers(mlp) for mlp in decoder.output_hypernetworks_mlps],
        iou_mlp=_linear_layers(decoder.iou_prediction_head),
        act=nn.GELU(),
    )


def _linear_layers(mlp: reference.MLP) -> list[nn.Linear]:
    return [*(layer[0] for layer in mlp.layers), mlp.fc]
