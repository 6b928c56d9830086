"""Keys of a checkpoint whose encoder is SAM's ViT, with the shapes that must agree."""

from __future__ import annotations

import re

from medsa_deploy.exporters.decoders import STEMS as DECODER_STEMS
from medsa_deploy.exporters.decoders import mask_tokens
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.exporters.training import TrainingCode, codes_by_keys

STEMS = ("image_encoder.patch_embed.", *DECODER_STEMS)

REQUIRED = {
    "image_encoder.patch_embed.proj.weight": "C 3 p p",
    "image_encoder.pos_embed": "1 * * C",
    "image_encoder.blocks.#.mlp.lin1.weight": "* C",
    "image_encoder.neck.0.weight": "256 C 1 1",
}
OPTIONAL = {
    "image_encoder.blocks.#.attn.rel_pos_h": "* d",
    "image_encoder.blocks.#.attn.rel_pos_w": "* d",
    "image_encoder.blocks.#.Space_Adapter.D_fc1.weight": "* C",
    "image_encoder.blocks.#.MLP_Adapter.D_fc1.weight": "* C",
    "image_encoder.blocks.#.Depth_Adapter.D_fc1.weight": "* C",
}
FOREIGN = re.compile(
    r"\.Adapter\.|\.linear_[ab]_[qv]\.|_proj\.w_[ab]\.|^w_[ab]_\d|^prompt_encoder\.(invalid|bbox)_"
)
"""Keys of families that share the ViT."""
FEWEST_MASK_TOKENS = 4
"""SAM has four mask tokens, and Med-SA's networks have at least as many."""
UNUSED_IN_2D = re.compile(r"^image_encoder\.blocks\.\d+\.Depth_Adapter\.")


def recognises(shapes: Shapes) -> bool:
    """Whether there are ViT blocks."""
    return shapes.count("image_encoder.blocks") > 0


def admits(shapes: Shapes) -> bool:
    """Whether all adapters and updates, if any, are the public Med-SA code's."""
    foreign = any(map(FOREIGN.search, shapes)) or 0 < mask_tokens(shapes) < FEWEST_MASK_TOKENS
    return recognises(shapes) and not foreign


def codes(shapes: Shapes) -> tuple[TrainingCode, ...]:
    """SAM-Med2D may train SAM without adapters."""
    codes = codes_by_keys(shapes)
    return codes if codes == ("med-sa",) else ("sam", "medsam", "sam-med2d", "med-sa")
