"""Options → whether a network sees slices in depth, and how; a checkpoint does not say.

Checkpoints trained in 2D carry Depth_Adapter keys too, untrained, so 3D is only ever asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from medsa_deploy.bundle.manifest import DepthGrouping
from medsa_deploy.errors import UsageError

from .guesses import Guess, Overrides
from .shapes import Shapes
from .sizes import Kind

KINDS = ("Space_Adapter", "MLP_Adapter", "Depth_Adapter")
"""What every block of a network trained in 3D has."""


@dataclass(frozen=True, kw_only=True)
class DepthFacts:
    """SD-Trans's part of `manifest.Network`."""

    sd_trans: DepthGrouping | None = None
    depth_chunk: int | None = None
    slices: int | None = None


def depth_of(shapes: Shapes, kind: Kind, overrides: Overrides, guesses: list[Guess]) -> DepthFacts:
    """What the options say; UsageError where they do not fit together, or the checkpoint."""
    chunk, slices = overrides.depth_chunk, overrides.slices
    if chunk is None:
        _refuse_stray_options(overrides)
        if kind == "vit" and any(".Depth_Adapter." in key for key in shapes):
            because = "its Depth_Adapter keys are in 2D checkpoints too"
            guesses.append(Guess(fact="3D", value="no", because=because, option="--depth-chunk"))
        return DepthFacts()
    _check_adapters(shapes, kind)
    if chunk != "none":
        if slices is not None:
            raise UsageError("--slices goes with --depth-chunk none: leave one of them out")
        _at_least_two("--depth-chunk", chunk)
    elif slices is None:
        raise UsageError(
            "--depth-chunk none attends over every slice there is, so the graph is made for one "
            "number of them: give --slices D"
        )
    else:
        _at_least_two("--slices", slices)
        if overrides.sd_trans == "paper":
            raise UsageError("--sd-trans paper groups the slices of a chunk: give --depth-chunk D")
    grouping = overrides.sd_trans or "public"
    if overrides.sd_trans is None and chunk != "none":
        because = "the public code groups by a literal reshape"
        guesses.append(Guess(fact="SD-Trans", value=grouping, because=because, option="--sd-trans"))
    return DepthFacts(
        sd_trans=grouping, depth_chunk=None if chunk == "none" else chunk, slices=slices
    )


def _refuse_stray_options(overrides: Overrides) -> None:
    """Options of 3D without 3D."""
    for name in ("slices", "sd_trans", "prompt_scope"):
        if getattr(overrides, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is for 3D networks: add --depth-chunk, or leave it out")


def _check_adapters(shapes: Shapes, kind: Kind) -> None:
    """UsageError unless the checkpoint can be a 3D one."""
    if kind != "vit":
        what = {"tiny_vit": "a TinyViT", "efficient_sam": "efficient_sam"}[kind]
        raise UsageError(f"--depth-chunk: 3D is for SAM ViTs with adapters; this is {what}")
    prefix = "image_encoder.blocks"
    lacking = [
        f"{prefix}.{i}.{kind}"
        for i in range(shapes.count(prefix))
        for kind in KINDS
        if f"{prefix}.{i}.{kind}.D_fc1.weight" not in shapes
    ]
    if lacking:
        raise UsageError(
            f"--depth-chunk: 3D needs a Space, an MLP and a Depth adapter in every block; this "
            f"checkpoint has no {lacking[0]}: leave the option out"
        )


def _at_least_two(option: str, number: int) -> None:
    if number < 2:
        raise UsageError(f"{option} {number}: depth takes at least 2 slices; without it, 2D")
