"""Where a checkpoint comes from → the conventions that decide whether its masks are right.

The defaults are those of `medsa.md` §5. Each is a guess, and an option overrules it.
"""

from __future__ import annotations

import math

from medsa_deploy.bundle.manifest import Conventions, Network, PointOrder, PreprocessingName
from medsa_deploy.errors import UsageError
from medsa_deploy.transforms import probability_to_logit

from .guesses import Guess, Overrides

EFFICIENT_SAM_FRAME = 1024
"""Side of the frame that the public code scales efficient_sam's coordinates to."""
EFFICIENT_SAM_POINTS = 6
"""Points it pads a prompt set to."""
BOX_AND_CLICK = 3
"""Points that a box and a click are."""


def conventions_of(
    network: Network, overrides: Overrides, guesses: list[Guess], *, public_training: bool
) -> Conventions:
    """Defaults by origin, and what the user set instead; UsageError for what cannot be used.

    `public_training`: the file is a training container of the public Med-SA code.
    """
    profile, order, why = _origin(network, public_training)
    if overrides.preprocess is None:
        because = why
        if profile == "sam":
            because += "; MedSAM's files look the same, but need --preprocess medsam"
        guesses.append(
            Guess(fact="preprocess", value=profile, because=because, option="--preprocess")
        )
    if overrides.point_order is None:
        because = f"{why}, which samples clicks as (row, column)" if order == "yx" else why
        guesses.append(
            Guess(fact="point order", value=order, because=because, option="--point-order")
        )
    if network.chunk > 1 and overrides.prompt_scope is None:
        because = "the public code gives a chunk the clicks of all its slices in one set"
        guesses.append(
            Guess(fact="prompt scope", value="chunk", because=because, option="--prompt-scope")
        )
    return Conventions(
        preprocess=overrides.preprocess or profile,
        point_order=overrides.point_order or order,
        point_frame=overrides.point_frame or "network",
        prompt_scope=overrides.prompt_scope or "chunk",
        point_scale=_point_scale(network, overrides, guesses),
        pad_points=_pad_points(network, overrides, guesses),
        intensity_window=_intensity_window(overrides.intensity_window),
        threshold=0.5 if overrides.threshold is None else _threshold(overrides.threshold),
        class_names=_class_names(overrides.class_names or (), network.classes),
    )


def _origin(network: Network, public_training: bool) -> tuple[PreprocessingName, PointOrder, str]:
    """Preprocessing, order of clicks, and what shows them."""
    if network.family == "litemedsam":
        return "litemedsam", "xy", "LiteMedSAM's network"
    if public_training or network.adapters or network.two_way == "public":
        return "medsa", "yx", "trained by the public Med-SA code"
    return "sam", "xy", "SAM's keys"


def _point_scale(network: Network, overrides: Overrides, guesses: list[Guess]) -> float:
    """Factor on coordinates: the public code scales efficient_sam's to 1024 pixels, S or not."""
    scale = overrides.point_scale
    if scale is not None:
        if not 0 < scale < math.inf:
            raise UsageError(f"--point-scale {scale:g} cannot be used: give a number above 0")
        return scale
    if network.family != "efficient_sam":
        return 1.0
    scale = EFFICIENT_SAM_FRAME / network.image_size
    because = f"{EFFICIENT_SAM_FRAME}/{network.image_size}, as the public Med-SA code scales them"
    guesses.append(
        Guess(fact="point scale", value=f"{scale:g}", because=because, option="--point-scale")
    )
    return scale


def _pad_points(network: Network, overrides: Overrides, guesses: list[Guess]) -> int | None:
    """Points a prompt set is padded to; None is SAM's way.

    The public code pads efficient_sam's clicks to six. Of boxes it says nothing; EfficientSAM's own
    code counts their corners among the six, and so does this.
    """
    pad = overrides.pad_points
    if network.family != "efficient_sam":
        if pad is not None:
            raise UsageError("--pad-points is for efficient_sam: leave the option out")
        return None
    if pad is not None:
        if pad != 0 and pad < BOX_AND_CLICK:
            raise UsageError(
                f"--pad-points {pad} cannot be used: give 0 for no padding, or {BOX_AND_CLICK} or "
                "more, as a box and a click are"
            )
        return pad
    pad = EFFICIENT_SAM_POINTS
    because = "as the public Med-SA code pads them, box corners counted"
    guesses.append(
        Guess(fact="points padded to", value=str(pad), because=because, option="--pad-points")
    )
    return pad


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
