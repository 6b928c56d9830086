"""The code that trained a network → how its networks take images, clicks and prompts.

A checkpoint's keys show the code only in part: `--trained-with` names it where they leave a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medsa_deploy.bundle.manifest import MaskChoice, PointOrder, PreprocessingName, PromptNeed

from .shapes import Shapes

TrainingCode = Literal[
    "med-sa",
    "sam",
    "medsam",
    "litemedsam",
    "sam-med2d",
    "finetune-sam",
    "samed",
    "efficientsam",
]
"""`med-sa`: the public Med-SA code. `medsam`: Meta's network as MedSAM trains it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The conventions that come with the code that trained a network."""

    preprocess: PreprocessingName
    point_order: PointOrder = "xy"
    prompts: PromptNeed = "required"
    mask_choice: MaskChoice = "first"
    because: str
    """What shows the origin."""


ORIGINS: Mapping[TrainingCode, Origin] = {
    "med-sa": Origin(
        preprocess="medsa", point_order="yx", because="trained by the public Med-SA code"
    ),
    "sam": Origin(preprocess="sam", because="SAM's keys"),
    "medsam": Origin(preprocess="medsam", because="trained by MedSAM's code"),
    "litemedsam": Origin(preprocess="litemedsam", because="LiteMedSAM's network"),
    "sam-med2d": Origin(preprocess="sam-med2d", because="SAM-Med2D's adapters"),
    "finetune-sam": Origin(
        preprocess="finetune-sam", prompts="none", because="finetune-SAM's adapters or mask tokens"
    ),
    "samed": Origin(preprocess="samed", prompts="none", because="SAMed's updates"),
    "efficientsam": Origin(
        preprocess="efficientsam", mask_choice="best", because="EfficientSAM's own network"
    ),
}


def codes_by_keys(shapes: Shapes) -> tuple[TrainingCode, ...]:
    """The codes that may have trained a network, by Med-SA's adapters, updates and two-way form."""
    medsa = ("_Adapter.", ".lora_", "mask_decoder.transformer.layers.0.mlp.layers.0.0.")
    if any(mark in key for key in shapes for mark in medsa):
        return ("med-sa",)
    return ("sam", "medsam", "med-sa")
