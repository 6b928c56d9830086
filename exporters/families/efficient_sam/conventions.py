"""Conventions of efficient_sam: the public Med-SA code's frame and number of points."""

from medsa_deploy.exporters.families.family import FamilyConventions

CONVENTIONS = FamilyConventions(click_frame=1024, pad_points=6)
