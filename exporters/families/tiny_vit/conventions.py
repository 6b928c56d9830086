"""Conventions of LiteMedSAM; mobile_sam's depend on the code that trained it."""

from medsa_deploy.exporters.families.family import FamilyConventions, Origin

CONVENTIONS = FamilyConventions(
    origins={
        "litemedsam": Origin(
            preprocess="litemedsam", point_order="xy", because="LiteMedSAM's network"
        )
    }
)
