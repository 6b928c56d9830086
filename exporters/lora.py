"""LoRA and AdaLoRA merged into the linear layers they adapt (folding 10): exact, nothing left.

LoRA       W + (B A) / r
fused qkv  the first third of W's rows + (B₁ A₁) / r, the last third + (B₂ A₂) / r
AdaLoRA    W + B (E ∘ A) / (ranknum + 1e-5), E scaling the rows of A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medsa_deploy.errors import CheckpointError

PARTS = ("lora_A", "lora_B", "lora_E", "ranknum")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """One linear layer that carried a low-rank update."""

    linear: str
    rank: int
    kind: str
    """`lora`, `lora on first and last third`, `adalora`."""
    parameters: int
    """Weights of the update before it was merged."""


def merge(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[LoRA, ...]]:
    """The tensors with every update merged into its weight, and what was merged."""
    merged = {k: v for k, v in tensors.items() if k.rsplit(".", 1)[-1] not in PARTS}
    found = []
    for key in tensors:
        if key.endswith(".lora_A"):
            linear = key.removesuffix(".lora_A")
            update, lora = _update(tensors, linear)
            weight = f"{linear}.weight"
            merged[weight] = (tensors[weight].double() + update).to(tensors[weight].dtype)
            found.append(lora)
    return merged, tuple(found)


def _update(tensors: Mapping[str, Tensor], linear: str) -> tuple[Tensor, LoRA]:
    """What is added to a linear's weight, (out, in) float64."""
    try:
        weight, a, b = (
            tensors[f"{linear}.{part}"].double() for part in ("weight", "lora_A", "lora_B")
        )
    except KeyError as e:
        raise CheckpointError(f"{linear} has lora_A, but the checkpoint lacks {e}") from e
    rank = b.shape[1]
    if f"{linear}.lora_E" in tensors:
        scaled = tensors[f"{linear}.lora_E"].double() * a
        ranknum = tensors[f"{linear}.ranknum"].double() + 1e-5
        update, kind = (b @ scaled) / ranknum, "adalora"
    elif a.shape[0] == 2 * rank and 3 * b.shape[0] == 2 * weight.shape[0]:
        update, kind = torch.zeros_like(weight), "lora on first and last third"
        third = weight.shape[0] // 3
        update[:third] = b[:third] @ a[:rank] / rank
        update[-third:] = b[third:] @ a[rank:] / rank
    else:
        update, kind = b @ a / rank, "lora"
    if update.shape != weight.shape:
        raise CheckpointError(
            f"{linear}: a low-rank update of shape {tuple(update.shape)} does not fit its weight "
            f"{tuple(weight.shape)} (lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)})"
        )
    parameters = a.numel() + b.numel() + (rank if kind == "adalora" else 0)
    return update, LoRA(linear=linear, rank=rank, kind=kind, parameters=parameters)
