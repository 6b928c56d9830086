"""Image → network frame, prompts → network coordinates, logits → masks.

These steps surround the graphs. They must be those of the network's training, or masks are wrong.
"""

from .image import Frame, frame_of, preprocess
from .intensities import check_not_flat, display_values, intensities
from .masks import (
    MaskRule,
    class_margins,
    class_probabilities,
    exclusive_labels,
    image_masks,
    label_map,
    mask_rule,
    pixel_values,
    prepare_postprocessing,
    probability_to_logit,
    threshold_value,
)
from .postprocessing import POSTPROCESSING, PostprocessingSpec
from .preprocessing import PREPROCESSING, PreprocessingSpec
from .prompts import NO_MASK_PROMPTS, UNPROMPTED, Prompt, network_prompt, prompts, prompts_for

__all__ = [
    "NO_MASK_PROMPTS",
    "POSTPROCESSING",
    "PREPROCESSING",
    "UNPROMPTED",
    "Frame",
    "MaskRule",
    "PostprocessingSpec",
    "PreprocessingSpec",
    "Prompt",
    "check_not_flat",
    "class_margins",
    "class_probabilities",
    "display_values",
    "exclusive_labels",
    "frame_of",
    "image_masks",
    "intensities",
    "label_map",
    "mask_rule",
    "network_prompt",
    "pixel_values",
    "prepare_postprocessing",
    "preprocess",
    "probability_to_logit",
    "prompts",
    "prompts_for",
    "threshold_value",
]
