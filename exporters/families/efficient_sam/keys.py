"""Keys of an efficient_sam as the public Med-SA code trains it, with the shapes that must agree."""

from __future__ import annotations

import re

from medsa_deploy.bundle.manifest import TwoWay
from medsa_deploy.exporters.decoders import TRANSFORMER
from medsa_deploy.exporters.families.sam_vit import keys as sam_vit
from medsa_deploy.exporters.shapes import Shapes

STEMS, OPTIONAL, UNUSED_IN_2D = sam_vit.STEMS, sam_vit.OPTIONAL, sam_vit.UNUSED_IN_2D
PROMPTS = ("prompt_encoder.invalid_points.", "prompt_encoder.bbox_")
"""Beginnings of keys that no other family has."""

OWN_MLP = re.compile(r"(image_encoder\.blocks\.\d+\.mlp)\.fc([12])\.")
"""An MLP as EfficientSAM's own code names it; the public Med-SA code's names are lin1 and lin2."""

REQUIRED = sam_vit.REQUIRED | {"image_encoder.pos_embed": "1 197 C"}
"""197: a class token and 14×14."""
DECODER = TRANSFORMER | {
    "prompt_encoder.invalid_points.weight": "1 256",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "2 128",
    "mask_decoder.mask_tokens.weight": "M 256",
    "mask_decoder.final_output_upscaling_layers.0.0.weight": "256 u 2 2",
    "mask_decoder.final_output_upscaling_layers.1.0.weight": "u v 2 2",
    "mask_decoder.output_hypernetworks_mlps.#.layers.0.0.weight": "m 256",
    "mask_decoder.output_hypernetworks_mlps.#.fc.weight": "v m",
    "mask_decoder.iou_prediction_head.layers.0.0.weight": "i 256",
    "mask_decoder.iou_prediction_head.fc.weight": "M i",
}


def recognises(shapes: Shapes) -> bool:
    """Whether it has EfficientSAM's prompts, and blocks by the public Med-SA code's names."""
    return has_prompts(shapes) and not has_own_blocks(shapes)


def has_prompts(shapes: Shapes) -> bool:
    """Whether it has EfficientSAM's prompts."""
    return any(key.startswith(PROMPTS) for key in shapes)


def has_own_blocks(shapes: Shapes) -> bool:
    """Whether blocks have the names of EfficientSAM's own code."""
    return any(OWN_MLP.match(key) for key in shapes)


def two_way(shapes: Shapes) -> TwoWay:
    """EfficientSAM has no other form."""
    return "public"
