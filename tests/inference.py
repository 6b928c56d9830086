"""Facts from keys without a checkpoint file, and refusals of them."""

from __future__ import annotations

from typing import Any

import pytest
from invented import Keys, hollow, vit_keys

from medsa_deploy.errors import MedsaError
from medsa_deploy.exporters.architecture import Architecture, Overrides, infer

ADAPTED = {"Space": range(4), "MLP": range(4)}
TABLES = (27, 15, 27, 15)


def infer_keys(keys: Keys, *, public_training: bool = False, **overrides: Any) -> Architecture:
    return infer(hollow(keys, public_training=public_training), Overrides(**overrides))


def guessed(architecture: Architecture) -> dict[str, str]:
    """Option that overrules a guess → the guess, those about conventions and classes left out."""
    excluded = {"--preprocess", "--point-order", "--classes", "--trained-with"}
    return {g.option: g.value for g in architecture.guesses if g.option not in excluded}


def refusal(keys: Keys, kind: type[MedsaError], **overrides: Any) -> str:
    """The one line with which keys and options are refused."""
    with pytest.raises(kind) as refused:
        infer_keys(keys, **overrides)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def changed(changes: dict[str, tuple[int, ...] | None]) -> Keys:
    """Keys of a small network with some of them set, or taken out (None)."""
    keys: dict[str, Any] = vit_keys(adapters=ADAPTED) | changes
    return {key: shape for key, shape in keys.items() if shape is not None}
