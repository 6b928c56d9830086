"""What a checkpoint does not settle: the options that set it, and the guesses made without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medsa_deploy.bundle.manifest import (
    DepthGrouping,
    PointFrame,
    PointOrder,
    PreprocessingName,
    PromptScope,
)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a user may set where a checkpoint does not say, or against what it suggests."""

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
    preprocess: PreprocessingName | None = None
    intensity_window: tuple[float, float] | None = None
    point_order: PointOrder | None = None
    point_frame: PointFrame | None = None
    prompt_scope: PromptScope | None = None
    point_scale: float | None = None
    """What coordinates are multiplied by."""
    pad_points: int | None = None
    """Points a set is padded to, for efficient_sam; 0 for no padding."""
    threshold: float | None = None
    """A probability."""
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A fact the checkpoint does not settle."""

    fact: str
    value: str
    because: str
    option: str
    """The option that overrules it."""
