"""Conventions of EfficientSAM's own code: it pads prompts, and scales clicks to its frame."""

from medsa_deploy.exporters.families.family import FamilyConventions

CONVENTIONS = FamilyConventions(pad_points=6, pads="EfficientSAM's own code")
