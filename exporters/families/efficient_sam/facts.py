"""An EfficientSAM's keys and shapes → facts: every block is global, tables show the image size."""

from __future__ import annotations

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.exporters.families.sam_vit.facts import head_count, tables, token_grid
from medsa_deploy.exporters.guesses import Guess, Overrides, refuse_options
from medsa_deploy.exporters.shapes import Shapes


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """Heads and image size from the relative-position tables."""
    refuse_options(
        overrides,
        ("window_size", "global_blocks"),
        "SAM ViTs; efficient_sam's blocks are all global",
    )
    width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    rows, head_size = tables(shapes)
    grid = token_grid(rows, 0, patch, overrides, guesses)
    return FamilyFacts(
        family="efficient_sam",
        encoder="vit",
        widths=(width,),
        depths=(len(rows),),
        heads=(head_count(width, head_size, overrides, guesses),),
        windows=(0,),
        global_blocks=tuple(range(len(rows))),
        image_size=grid * patch,
        embedding_size=grid,
        patch_size=patch,
    )
