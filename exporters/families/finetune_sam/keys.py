"""Keys that only finetune-SAM's files have, and those that its files share with others."""

from __future__ import annotations

import re

from medsa_deploy.exporters.decoders import mask_tokens, two_way_by_keys
from medsa_deploy.exporters.families.sam_vit import keys as sam_vit
from medsa_deploy.exporters.shapes import Shapes

SHOWN_BY = re.compile(
    r"mask_decoder\.transformer\.layers\.\d+\.Adapter\."
    r"|mask_decoder\..*_proj\.w_[ab]\."
    r"|image_encoder\.blocks\.\d+\.attn\.qkv\.linear_[ab]_[qv]\."
)
"""SAMed's networks, saved whole, have the last of these too."""
FEWEST_LABELS = 2
"""The background and a class; one mask token more is not used."""
FOREIGN = re.compile(
    r"\.lora_|HyP_Adapter\.|Image_Adapter\.|\.Adapter\.channel\.|^w_a_\d|invalid_points"
)
"""Keys of other families and codes."""


def recognises(shapes: Shapes) -> bool:
    """Whether there are finetune-SAM's adapters or updates, or fewer mask tokens than SAM has."""
    fewer = 1 + FEWEST_LABELS <= mask_tokens(shapes) < sam_vit.FEWEST_MASK_TOKENS
    return (fewer or any(map(SHOWN_BY.match, shapes))) and admits(shapes)


def admits(shapes: Shapes) -> bool:
    """Whether it is a SAM ViT in Meta's form: finetune-SAM's may lack every adapter."""
    foreign = any(map(FOREIGN.search, shapes)) or two_way_by_keys(shapes) != "meta"
    return sam_vit.recognises(shapes) and not foreign
