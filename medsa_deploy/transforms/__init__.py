"""Image → network frame, prompts → network coordinates, logits → masks.

These steps surround the graphs. They must be those of the network's training, or masks are wrong.
"""

from .image import Frame, frame_of, preprocess
from .intensities import check_not_flat, display_values, intensities
from .masks import label_map, prepare_upsampling, probability_to_logit, upsample
from .preprocessing import PREPROCESSING, PreprocessingSpec
from .prompts import NO_MASK_PROMPTS, Prompt, network_prompt, prompts

__all__ = [
    "NO_MASK_PROMPTS",
    "PREPROCESSING",
    "Frame",
    "PreprocessingSpec",
    "Prompt",
    "check_not_flat",
    "display_values",
    "frame_of",
    "intensities",
    "label_map",
    "network_prompt",
    "prepare_upsampling",
    "preprocess",
    "probability_to_logit",
    "prompts",
    "upsample",
]
