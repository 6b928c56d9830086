"""How a precision's graphs were made from the float32 graphs, as the manifest records it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Target = Literal["any", "tensorrt", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Images and method by which the ranges of activations were measured."""

    images: int
    """Images and slices of volumes."""
    names_sha256: str
    """SHA-256 of the images' names, one name a line."""
    method: str
    """`min-max`, or `percentile 99.99` of magnitudes."""


@dataclass(frozen=True, kw_only=True)
class Island:
    """Nodes of a float16 graph that stay float32 for one reason."""

    reason: str
    """`norms`, `softmax`, `coordinates`, `values beyond float16`…"""
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The types one precision's graphs compute in, and the measurements behind the choice."""

    precision: str
    target: Target = "any"
    """The kind of device the graphs are meant for."""
    islands: tuple[Island, ...] = ()
    """Nodes that stay float32, over both graphs."""
    float32_blocks: tuple[str, ...] = ()
    """Blocks returned to float32 because masks were worse without: `encoder blocks.3`."""
    rounded_dice_mean: float | None = None
    """Mask Dice against float32 when each operator's result is rounded to float16: ONNX Runtime on
    a CPU does not round, so this is measured separately."""
    rounded_dice_worst: float | None = None
    quantized: tuple[str, ...] = ()
    """Linear layers with INT8 weights and inputs: `blocks.3.attention.query`."""
    left_out: tuple[str, ...] = ()
    """Linear layers left unquantized because masks were worse otherwise, most harmful first."""
    weights: str | None = None
    """`int8, symmetric, per channel`"""
    activations: str | None = None
    """`int8, symmetric` or `uint8`"""
    calibration: Calibration | None = None
    reference_dice_mean: float | None = None
    """Mask Dice on the bundle's saved reference, a seeded image. INT8 is calibrated and judged on a
    user's images; on the reference it only has to reproduce this figure."""
    runs: int = 0
    """Times the search ran the verification cases."""
