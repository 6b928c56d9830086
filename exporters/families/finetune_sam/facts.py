"""A finetune-SAM network's keys and shapes → facts, as SAM's ViT."""

from __future__ import annotations

from dataclasses import replace

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.exporters.families.sam_vit import facts as sam_vit
from medsa_deploy.exporters.guesses import Guess, Overrides
from medsa_deploy.exporters.shapes import Shapes

FIRST_LABEL = 1
"""Of its N + 1 mask tokens, token 0 is not used."""


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """Heads, windows and image size from the relative-position tables."""
    facts = sam_vit.facts_of(shapes, overrides, guesses, adapted=adapted)
    return replace(facts, family="finetune_sam")
