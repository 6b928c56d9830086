"""How a family's files hold weights: factors of low-rank updates, and adapters without their base.

The default is the public Med-SA code's; a family with another layout describes it in its folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .lora import LoRA, merge

Tensors = Mapping[str, Tensor]

REL_POS = re.compile(r"(image_encoder\.blocks\.\d+\.attn\.)rel_(?:pos_)?([hw])\Z")
"""A relative-position table: `rel_pos_h` in Meta's and old Med-SA files, `rel_h` in newer ones."""


@dataclass(frozen=True, kw_only=True)
class BaseTensors:
    """The tensors of a base that go under a file of adapters."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    """What a user should know about them."""


def under_adapters(adapters: Tensors, base: Tensors, name: str) -> BaseTensors:
    """What the adapters do not bring. `name`: the base's file.

    A two-way block that brings the public code's MLP replaces Meta's, whose keys differ.
    """
    replaced = {
        key[: key.index(".mlp.")]
        for key in adapters
        if ".mlp.layers.0.0." in key or ".mlp.fc." in key
    }
    used = {
        key: value
        for key, value in base.items()
        if key not in adapters and not any(key.startswith(f"{b}.mlp.lin") for b in replaced)
    }
    notes: tuple[str, ...] = ()
    if any(REL_POS.match(key) and value.any() for key, value in used.items()):
        notes = (
            f"the relative-position tables are those of {name}; the public code since January "
            "2024 trains without them: adapters from it need a base whose tables are zero",
        )
    return BaseTensors(tensors=used, notes=notes)


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """How the files of a family hold weights."""

    merge: Callable[[Tensors], tuple[dict[str, Tensor], tuple[LoRA, ...]]] = merge
    """The tensors with every low-rank update merged, and what was merged."""
    adapter_keys: re.Pattern[str] = re.compile(r"_Adapter\.|\.lora_")
    """Keys of a file that needs a base if it lacks a module."""
    under: Callable[[Tensors, Tensors, str], BaseTensors] = under_adapters
    """A file's tensors, a base's and its name → what is used of the base."""
    as_base: Callable[[Tensors], Tensors] = lambda tensors: tensors
    """The tensors of a base of this family, by the names of the networks that go over it."""


MEDSA = FileLayout()
