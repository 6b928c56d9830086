"""Keys of SAM-Med2D's adapters, with the shapes that must agree."""

from __future__ import annotations

import re

from medsa_deploy.exporters.families.sam_vit import keys as sam_vit
from medsa_deploy.exporters.shapes import Shapes

GATE = re.compile(r"image_encoder\.blocks\.\d+\.Adapter\.channel\.0\.weight")
ADAPTERS = {"channel-space": r"image_encoder\.blocks\.\d+\.Adapter\."}
OPTIONAL = {key: shape for key, shape in sam_vit.OPTIONAL.items() if "_Adapter." not in key} | {
    "image_encoder.blocks.#.Adapter.norm.weight": "C",
    "image_encoder.blocks.#.Adapter.channel.0.weight": "* C",
    "image_encoder.blocks.#.Adapter.channel.2.weight": "C *",
    "image_encoder.blocks.#.Adapter.spatial.0.weight": "C C 3 3",
    "image_encoder.blocks.#.Adapter.spatial.2.weight": "C C 4 4",
}


def recognises(shapes: Shapes) -> bool:
    """Whether a block has an adapter with a gate of channels."""
    return sam_vit.recognises(shapes) and any(map(GATE.fullmatch, shapes))
