"""Options → how SD-Trans runs in a network, or that it does not: a checkpoint does not show it.

Checkpoints trained in 2D have Depth_Adapter keys too, untrained, so only an option turns 3D on.
"""

from __future__ import annotations

from medsa_deploy.errors import UsageError

from .families.family import Family
from .guesses import Guess, Overrides
from .sd_trans import SDTrans
from .shapes import Shapes

KINDS = ("Space_Adapter", "MLP_Adapter", "Depth_Adapter")
"""Every block of a network trained in 3D has them."""


def depth_of(
    shapes: Shapes, family: Family, overrides: Overrides, guesses: list[Guess]
) -> SDTrans | None:
    """SD-Trans as the options ask for it; None for 2D.

    UsageError for options that fit neither each other nor the checkpoint.
    """
    chunk, slices = overrides.depth_chunk, overrides.slices
    if chunk is None:
        _refuse_stray_options(overrides)
        if family.takes_slices and any(".Depth_Adapter." in key for key in shapes):
            because = "its Depth_Adapter keys are in 2D checkpoints too"
            guesses.append(Guess(fact="3D", value="no", because=because, option="--depth-chunk"))
        return None
    _check_adapters(shapes, family)
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
    return SDTrans(grouping=grouping, chunk=None if chunk == "none" else chunk, slices=slices)


def _refuse_stray_options(overrides: Overrides) -> None:
    """Options of 3D without 3D."""
    for name in ("slices", "sd_trans", "prompt_scope"):
        if getattr(overrides, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is for 3D networks: add --depth-chunk, or leave it out")


def _check_adapters(shapes: Shapes, family: Family) -> None:
    """UsageError unless the checkpoint can be a 3D one."""
    if not family.takes_slices:
        raise UsageError(f"--depth-chunk: 3D is for SAM ViTs with adapters; this is {family.noun}")
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
