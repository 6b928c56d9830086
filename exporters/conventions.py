"""Where a checkpoint comes from → the conventions that decide whether its masks are right.

The defaults are those of `medsa.md` §5. Each is a guess, and an option overrules it.
"""

from __future__ import annotations

import math

from medsa_deploy.errors import UsageError
from medsa_deploy.manifest import Conventions, Network, PointOrder, ProfileName
from medsa_deploy.transforms import probability_to_logit

from .guesses import Guess, Overrides


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
        intensity_window=_intensity_window(overrides.intensity_window),
        threshold=0.5 if overrides.threshold is None else _threshold(overrides.threshold),
        class_names=_class_names(overrides.class_names or (), network.classes),
    )


def _origin(network: Network, public_training: bool) -> tuple[ProfileName, PointOrder, str]:
    """Preprocessing, order of clicks, and what shows them."""
    if network.family == "litemedsam":
        return "litemedsam", "xy", "LiteMedSAM's network"
    if public_training or network.adapters or network.two_way == "public":
        return "medsa", "yx", "trained by the public Med-SA code"
    return "sam", "xy", "SAM's keys"


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
