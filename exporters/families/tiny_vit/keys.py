"""Keys of a checkpoint whose encoder is a TinyViT, with the shapes that must agree."""

from __future__ import annotations

import re

from medsa_deploy.exporters.decoders import STEMS as DECODER_STEMS
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.exporters.training import TrainingCode, codes_by_keys

STEMS = ("image_encoder.patch_embed.", *DECODER_STEMS)

REQUIRED = {
    "image_encoder.patch_embed.seq.0.c.weight": "c 3 k k",
    "image_encoder.patch_embed.seq.2.c.weight": "W0 c k k",
    "image_encoder.layers.0.blocks.#.conv1.c.weight": "H W0 1 1",
    "image_encoder.layers.0.blocks.#.conv2.c.weight": "H 1 3 3",
    "image_encoder.layers.0.blocks.#.conv3.c.weight": "W0 H 1 1",
    "image_encoder.neck.0.weight": "256 W3 1 1",
}
OPTIONAL: dict[str, str] = {}
for _i in range(3):
    REQUIRED |= {
        f"image_encoder.layers.{_i}.downsample.conv1.c.weight": f"W{_i + 1} W{_i} 1 1",
        f"image_encoder.layers.{_i}.downsample.conv2.c.weight": f"W{_i + 1} 1 3 3",
        f"image_encoder.layers.{_i}.downsample.conv3.c.weight": f"W{_i + 1} W{_i + 1} 1 1",
        f"image_encoder.layers.{_i + 1}.blocks.#.attn.norm.weight": f"W{_i + 1}",
        f"image_encoder.layers.{_i + 1}.blocks.#.attn.attention_biases": f"h{_i + 1} o{_i + 1}",
        f"image_encoder.layers.{_i + 1}.blocks.#.local_conv.c.weight": f"W{_i + 1} 1 3 3",
        f"image_encoder.layers.{_i + 1}.blocks.#.mlp.fc1.weight": f"* W{_i + 1}",
    }
    OPTIONAL |= {
        f"image_encoder.layers.{_i + 1}.blocks.#.{kind}_Adapter.D_fc1.weight": f"* W{_i + 1}"
        for kind in ("Space", "MLP")
    }
UNUSED = re.compile(
    r"attention_bias_idxs$|^image_encoder\.(norm_head|head)\."
    r"|^image_encoder\.layers\.\d+\.blocks\.\d+\.Depth_Adapter\."
)


def recognises(shapes: Shapes) -> bool:
    """Whether there are stages."""
    return shapes.count("image_encoder.layers") > 0


def is_lite(shapes: Shapes) -> bool:
    """Whether the patch embedding keeps the resolution: LiteMedSAM's; mobile_sam's quarters it."""
    shape = shapes.get("image_encoder.patch_embed.seq.0.c.weight")
    return shape is not None and shape[2:3] == (1,)


def codes(shapes: Shapes) -> tuple[TrainingCode, ...]:
    """LiteMedSAM's code trains its own network; others train mobile_sam."""
    return ("litemedsam",) if is_lite(shapes) else codes_by_keys(shapes)
