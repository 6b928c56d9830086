"""Keys that only SAMed's files have, and those that its networks share with others."""

from __future__ import annotations

import re

from medsa_deploy.exporters.decoders import two_way_by_keys
from medsa_deploy.exporters.families.sam_vit import keys as sam_vit
from medsa_deploy.exporters.shapes import Shapes

FACTORS = re.compile(r"^w_[ab]_\d+$")
"""The updates of a file that holds no image encoder."""
FOREIGN = re.compile(r"_Adapter\.|\.Adapter\.|\.lora_|_proj\.w_[ab]\.|invalid_points")
"""Keys of other families and codes. LoRA in qkv alone may be a SAMed saved whole."""


def recognises(shapes: Shapes) -> bool:
    """Whether there are updates by number."""
    return any(map(FACTORS.match, shapes)) and admits(shapes)


def admits(shapes: Shapes) -> bool:
    """Whether it is a SAM ViT in Meta's form without adapters."""
    foreign = any(map(FOREIGN.search, shapes)) or two_way_by_keys(shapes) != "meta"
    return sam_vit.recognises(shapes) and not foreign


def hidden_size(shapes: Shapes) -> str | None:
    """A network over a base has another size than the base."""
    if any(map(FACTORS.match, shapes)):
        return (
            "a SAMed file does not show its image size, which is not its base's: give the size of "
            "training with --image-size, such as 512 or 224"
        )
    return None
