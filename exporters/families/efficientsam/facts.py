"""An EfficientSAM's keys and shapes → facts; without tables, nothing shows the image size."""

from __future__ import annotations

from dataclasses import replace

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.exporters.families.efficient_sam import facts as efficient_sam
from medsa_deploy.exporters.guesses import Guess, Overrides
from medsa_deploy.exporters.shapes import Shapes


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """As of the public Med-SA code's."""
    facts = efficient_sam.facts_of(shapes, overrides, guesses, adapted=adapted)
    return replace(facts, family="efficientsam")
