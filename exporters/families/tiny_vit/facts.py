"""A TinyViT's keys and shapes → facts; only the image size is not in the shapes."""

from __future__ import annotations

from math import isqrt

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.guesses import (
    Guess,
    Overrides,
    image_size_guess,
    refuse_options,
    whole_patches,
)
from medsa_deploy.exporters.shapes import Shapes

from .keys import is_lite

LITE_IMAGE_SIZE, LITE_PATCH = 256, 4
MOBILE_IMAGE_SIZE = 1024


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """LiteMedSAM's patch embedding keeps the resolution; mobile_sam's quarters it."""
    refuse_options(
        overrides, ("heads", "window_size", "global_blocks"), "SAM ViTs; this is a TinyViT"
    )
    prefix = "image_encoder.layers"
    stages = range(1, shapes.count(prefix))
    widths = [shapes[f"{prefix}.{i}.blocks.0.attn.norm.weight"][0] for i in stages]
    tables = [shapes[f"{prefix}.{i}.blocks.0.attn.attention_biases"] for i in stages]
    for i, width, (heads, offsets) in zip(stages, widths, tables, strict=True):
        if width % heads or isqrt(offsets) ** 2 != offsets:
            raise CheckpointError(
                f"wrong shapes: {prefix}.{i}.blocks.0.attn.attention_biases is {(heads, offsets)}, "
                f"expected (a divisor of the width {width}, a square)"
            )
    # Besides the patch embedding, two stages halve the resolution.
    lite = is_lite(shapes)
    patch = LITE_PATCH if lite else 4 * LITE_PATCH
    size = overrides.image_size
    if size is None:
        size, network = (
            (LITE_IMAGE_SIZE, "LiteMedSAM") if lite else (MOBILE_IMAGE_SIZE, "mobile_sam")
        )
        guesses.append(image_size_guess(size, f"no key shows it; {network}'s size"))
    whole_patches(size, patch)
    return FamilyFacts(
        family="litemedsam" if lite else "mobile_sam",
        encoder="tiny_vit",
        widths=(shapes[f"{prefix}.0.blocks.0.conv3.c.weight"][0], *widths),
        depths=tuple(shapes.count(f"{prefix}.{i}.blocks") for i in (0, *stages)),
        heads=(0, *(table[0] for table in tables)),
        windows=(0, *(isqrt(table[1]) for table in tables)),
        global_blocks=(),
        image_size=size,
        embedding_size=size // patch,
        patch_size=patch,
    )
