"""Where a checkpoint comes from → the conventions that decide whether its masks are right.

Each default is a guess, and an option sets it. `families/` has the conventions of a family.
"""

from __future__ import annotations

import math

from medsa_deploy.bundle.manifest import Conventions, Network, PostprocessingName, PromptNeed
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import PREPROCESSING, probability_to_logit

from .families.family import Family
from .families.registry import padded_families
from .guesses import Guess, Overrides
from .training import ORIGINS, Origin, TrainingCode

BOX_AND_CLICK = 3
"""Points that a box and a click are."""


def conventions_of(
    network: Network,
    family: Family,
    code: TrainingCode,
    overrides: Overrides,
    guesses: list[Guess],
) -> Conventions:
    """The user's options, and defaults by the code that trained the network.

    UsageError for an option that cannot be used.
    """
    origin = ORIGINS[code]
    _add_guesses(network, origin, overrides, guesses)
    return Conventions(
        preprocess=overrides.preprocess or origin.preprocess,
        point_order=overrides.point_order or origin.point_order,
        point_frame=overrides.point_frame or "network",
        prompt_scope=overrides.prompt_scope or "chunk",
        point_scale=_point_scale(network, family, overrides, guesses),
        pad_points=_pad_points(family, overrides, guesses),
        intensity_window=_intensity_window(overrides.intensity_window),
        threshold=0.5 if overrides.threshold is None else _threshold(overrides.threshold),
        class_names=_class_names(overrides.class_names or (), network.classes),
        postprocess=_postprocess(network, origin, overrides),
        prompts=_prompts(origin, overrides, guesses),
        trained_with=code,
        mask_choice=origin.mask_choice,
    )


def _postprocess(network: Network, origin: Origin, overrides: Overrides) -> PostprocessingName:
    """The user's choice, else that of the code that trained the network.

    `--preprocess medsam` says which code it was of SAM's; other networks keep their own way.
    """
    if overrides.postprocess is not None:
        return overrides.postprocess
    named = overrides.preprocess if network.outputs == "sam" else None
    preprocess = named or origin.preprocess
    return PREPROCESSING[preprocess].postprocess


def _prompts(origin: Origin, overrides: Overrides, guesses: list[Guess]) -> PromptNeed:
    if overrides.prompts is not None:
        return "required" if overrides.prompts else "none"
    if origin is ORIGINS["finetune-sam"]:
        because = "finetune-SAM trains without prompts, or with a box"
        guesses.append(Guess(fact="prompts", value="none", because=because, option="--prompts"))
    return origin.prompts


def _add_guesses(
    network: Network, origin: Origin, overrides: Overrides, guesses: list[Guess]
) -> None:
    """The guesses of preprocessing, order of clicks and prompt scope, unless options set them."""
    order = origin.point_order
    named = overrides.trained_with is not None
    if overrides.preprocess is None and not named:
        because = origin.because
        if origin.preprocess == "sam":
            because += "; MedSAM's files look the same, but need --preprocess medsam"
        guesses.append(
            Guess(
                fact="preprocess",
                value=origin.preprocess,
                because=because,
                option="--preprocess",
            )
        )
    if overrides.point_order is None and not named and origin.prompts != "none":
        because = origin.because
        if order == "yx":
            because += ", which samples clicks as (row, column)"
        guesses.append(
            Guess(fact="point order", value=order, because=because, option="--point-order")
        )
    if network.chunk > 1 and overrides.prompt_scope is None:
        because = "the public code gives a chunk the clicks of all its slices in one set"
        guesses.append(
            Guess(fact="prompt scope", value="chunk", because=because, option="--prompt-scope")
        )


def _point_scale(
    network: Network, family: Family, overrides: Overrides, guesses: list[Guess]
) -> float:
    """Factor on coordinates: the public code scales a family's to its frame, whatever S is."""
    scale = overrides.point_scale
    if scale is not None:
        if not 0 < scale < math.inf:
            raise UsageError(f"--point-scale {scale:g} cannot be used: give a number above 0")
        return scale
    frame = family.conventions.click_frame
    if frame is None:
        return 1.0
    scale = frame / network.image_size
    because = f"{frame}/{network.image_size}, as the public Med-SA code scales them"
    guesses.append(
        Guess(fact="point scale", value=f"{scale:g}", because=because, option="--point-scale")
    )
    return scale


def _pad_points(family: Family, overrides: Overrides, guesses: list[Guess]) -> int | None:
    """Points a prompt set is padded to; None is SAM's rule.

    The public code and EfficientSAM's own pad clicks to six. The public one does not handle boxes;
    EfficientSAM's counts their corners among the six, as this function does.
    """
    pad = overrides.pad_points
    default = family.conventions.pad_points
    if default is None:
        if pad is not None:
            raise UsageError(f"--pad-points is for {padded_families()}: leave the option out")
        return None
    if pad is not None:
        if pad != 0 and pad < BOX_AND_CLICK:
            raise UsageError(
                f"--pad-points {pad} cannot be used: give 0 for no padding, or {BOX_AND_CLICK} or "
                "more, as a box and a click are"
            )
        return pad
    because = f"as {family.conventions.pads} pads them, box corners counted"
    guesses.append(
        Guess(fact="points padded to", value=str(default), because=because, option="--pad-points")
    )
    return default


def _intensity_window(window: tuple[float, float] | None) -> tuple[float, float] | None:
    if window is not None and not 0 < window[1] - window[0] < math.inf:
        raise UsageError(
            f"--intensity-window {window[0]:g},{window[1]:g} cannot be used: "
            "give two finite numbers, the lower first"
        )
    return window


def _threshold(threshold: float) -> float:
    probability_to_logit(threshold)
    return threshold


def _class_names(names: tuple[str, ...], classes: int) -> tuple[str, ...]:
    shown = ", ".join(names)
    if names and len(names) != classes:
        raise UsageError(
            f"--class-names has {len(names)} names ({shown}) for {classes} class(es): "
            "set --classes to match"
        )
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--class-names {shown}: expected names that differ, none of them empty")
    return names
