"""Keys of an efficient_sam as the public Med-SA code trains it, with the shapes that must agree."""

from __future__ import annotations

from medsa_deploy.bundle.manifest import TwoWay
from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.decoders import TRANSFORMER
from medsa_deploy.exporters.families.sam_vit import keys as sam_vit
from medsa_deploy.exporters.shapes import Shapes

STEMS, OPTIONAL, UNUSED_IN_2D = sam_vit.STEMS, sam_vit.OPTIONAL, sam_vit.UNUSED_IN_2D
PROMPTS = ("prompt_encoder.invalid_points.", "prompt_encoder.bbox_")
"""Beginnings of keys that no other family has."""

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
    """Whether it has EfficientSAM's prompts; CheckpointError for EfficientSAM's own weights."""
    if not any(key.startswith(PROMPTS) for key in shapes):
        return False
    if "image_encoder.blocks.0.mlp.fc1.weight" in shapes:
        raise CheckpointError(
            "these are EfficientSAM's own weights (blocks with mlp.fc1): supported is "
            "efficient_sam as the public Med-SA code trains it (blocks with mlp.lin1)"
        )
    return True


def two_way(shapes: Shapes) -> TwoWay:
    """EfficientSAM has no other form."""
    return "public"
