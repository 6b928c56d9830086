"""Facts that a checkpoint does not determine: options that set them, guesses without an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medsa_deploy.bundle.manifest import (
    DepthGrouping,
    PointFrame,
    PointOrder,
    PostprocessingName,
    PreprocessingName,
    PromptScope,
)
from medsa_deploy.errors import UsageError

from .training import TrainingCode


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The options of the command line that set facts and conventions."""

    heads: int | None = None
    window_size: int | None = None
    """Attention window in tokens."""
    global_blocks: tuple[int, ...] | None = None
    image_size: int | None = None
    """Side of the network's input in pixels."""
    classes: int | None = None
    depth_chunk: int | Literal["none"] | None = None
    """3D: slices that attend to each other over depth; `none`: all of `slices`. None is 2D."""
    slices: int | None = None
    """Slices the encoder takes, with a `depth_chunk` of `none`."""
    sd_trans: DepthGrouping | None = None
    trained_with: TrainingCode | None = None
    """The code that trained the network."""
    prompts: bool | None = None
    """Whether the network was trained with prompts."""
    preprocess: PreprocessingName | None = None
    postprocess: PostprocessingName | None = None
    """How masks are made of logits; None: as the code that trained the network makes them."""
    intensity_window: tuple[float, float] | None = None
    point_order: PointOrder | None = None
    point_frame: PointFrame | None = None
    prompt_scope: PromptScope | None = None
    point_scale: float | None = None
    """Factor on coordinates."""
    pad_points: int | None = None
    """Points a set is padded to, for efficient_sam; 0 for no padding."""
    threshold: float | None = None
    """A probability."""
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A fact that the checkpoint does not determine."""

    fact: str
    value: str
    because: str
    option: str
    """The option that sets it."""


def image_size_guess(size: int, because: str) -> Guess:
    """The guess of an image size in pixels."""
    return Guess(fact="image size", value=str(size), because=because, option="--image-size")


def whole_patches(image_size: int, patch: int) -> int:
    """`image_size`; UsageError unless it is a multiple of the patch size."""
    if image_size < patch or image_size % patch:
        raise UsageError(f"--image-size {image_size} is not a multiple of the patch size {patch}")
    return image_size


def refuse_options(overrides: Overrides, names: tuple[str, ...], because: str) -> None:
    """UsageError, with `because`, if one of the options is set."""
    for name in names:
        if getattr(overrides, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for {because}")
