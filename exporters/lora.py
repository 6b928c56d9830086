"""LoRA and AdaLoRA merged into the linear layers they adapt (folding 10): exact, nothing left.

LoRA       W + (B A) / r
fused qkv  the first third of W's rows + (B₁ A₁) / r, the last third + (B₂ A₂) / r
AdaLoRA    W + B (E ∘ A) / (ranknum + 1e-5), E scaling the rows of A
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medsa_deploy.errors import CheckpointError

QKV_KIND = "lora on q and v"
"""A fused projection whose rows of q and v have factors of their own."""
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
    """The tensors with every update merged into its weight, and what was merged.

    CheckpointError for an update that is incomplete or does not fit its weight.
    """
    merged: dict[str, Tensor] = {}
    updates: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        linear, _, part = key.rpartition(".")
        if part in PARTS:
            updates.setdefault(linear, {})[part] = value.double()
        else:
            merged[key] = value
    updated = []
    for linear, parts in updates.items():
        adaptive = bool({"lora_E", "ranknum"} & set(parts))
        expected = PARTS if adaptive else PARTS[:2]
        lost = [f"{linear}.{part}" for part in expected if part not in parts]
        lost += [] if f"{linear}.weight" in merged else [f"{linear}.weight"]
        if lost:
            raise CheckpointError(
                f"{linear} carries {' and '.join(parts)}, but the checkpoint lacks "
                f"{' and '.join(lost)}"
            )
        weight = merged[f"{linear}.weight"]
        merged[f"{linear}.weight"], lora = _merged(linear, weight, parts)
        updated.append(lora)
    return merged, tuple(updated)


def _merged(linear: str, weight: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, LoRA]:
    """A linear's weight (out, in) with its update, in the type it has."""
    shapes = ", ".join(f"{part} {tuple(value.shape)}" for part, value in parts.items())
    unfit = CheckpointError(
        f"{linear}: its low-rank update ({shapes}) does not fit its weight {tuple(weight.shape)}"
    )
    a, b = parts["lora_A"], parts["lora_B"]
    if weight.ndim != 2 or a.ndim != 2 or b.ndim != 2 or not all((*a.shape, *b.shape)):
        raise unfit
    rank = b.shape[1]
    halves = a.shape[0] == 2 * rank and 3 * b.shape[0] == 2 * weight.shape[0]
    try:
        if "lora_E" in parts:
            scaled = parts["lora_E"].view(rank, 1) * a
            update, kind = b @ scaled / (parts["ranknum"].view(()) + 1e-5), "adalora"
        elif halves:
            third = weight.shape[0] // 3
            q, v = b[:third] @ a[:rank] / rank, b[third:] @ a[rank:] / rank
            update, kind = torch.cat([q, torch.zeros_like(q), v]), "lora on first and last third"
        else:
            update, kind = b @ a / rank, "lora"
    except RuntimeError as e:  # shapes that do not multiply
        raise unfit from e
    if update.shape != weight.shape:
        raise unfit
    merged = (weight.double() + update).to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(f"{linear}: its weight with its low-rank update is NaN or infinite")
    count = a.numel() + b.numel() + (rank if kind == "adalora" else 0)
    return merged, LoRA(linear=linear, rank=rank, kind=kind, parameters=count)


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of two factors, unscaled, that is added to rows of a weight."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(rows, r)"""
    third: int | None = None
    """Which third of the weight's rows: 0 for q, 2 for v. None for all of them."""


def with_products(linear: str, weight: Tensor, products: Sequence[Product]) -> tuple[Tensor, LoRA]:
    """A linear's weight (out, in) plus b @ a on its rows, in the type it has.

    CheckpointError for factors that do not fit it, and for a sum that is not finite.

    >>> ones = Product(a=torch.ones(1, 2), b=torch.ones(1, 1), third=2)
    >>> with_products("qkv", torch.zeros(3, 2), [ones])[0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    total = weight.double()
    for product in products:
        rows = slice(None)
        if product.third is not None and weight.ndim == 2:
            third = weight.shape[0] // 3
            rows = slice(product.third * third, (product.third + 1) * third)
        factors = (product.a, product.b)
        fits = all(factor.ndim == 2 and all(factor.shape) for factor in (*factors, weight))
        if (
            not fits
            or product.b.shape != (len(total[rows]), len(product.a))
            or product.a.shape[1] != weight.shape[1]
        ):
            shapes = ", ".join(str(tuple(factor.shape)) for factor in factors)
            raise CheckpointError(
                f"{linear}: its low-rank update ({shapes}) does not fit its weight "
                f"{tuple(weight.shape)}"
            )
        total[rows] += product.b.double() @ product.a.double()
    merged = total.to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(f"{linear}: its weight with its low-rank update is NaN or infinite")
    return merged, LoRA(
        linear=linear,
        rank=max(len(product.a) for product in products),
        kind="lora" if products[0].third is None else QKV_KIND,
        parameters=sum(product.a.numel() + product.b.numel() for product in products),
    )
