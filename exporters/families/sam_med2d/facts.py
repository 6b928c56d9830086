"""A SAM-Med2D network's keys and shapes → facts, as SAM's ViT."""

from __future__ import annotations

from dataclasses import replace

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.errors import UsageError
from medsa_deploy.exporters.families.sam_vit import facts as sam_vit
from medsa_deploy.exporters.guesses import Guess, Overrides
from medsa_deploy.exporters.shapes import Shapes


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """Heads, windows and image size from the relative-position tables.

    UsageError for a grid of an odd side, which the adapters cannot halve and double.
    """
    facts = sam_vit.facts_of(shapes, overrides, guesses, adapted=adapted)
    if facts.embedding_size % 2:
        raise UsageError(
            f"an image size of {facts.image_size} gives SAM-Med2D a grid of "
            f"{facts.embedding_size}×{facts.embedding_size} tokens, which its adapters cannot "
            f"halve: give --image-size a multiple of {2 * facts.patch_size}"
        )
    return replace(facts, family="sam_med2d")
