"""finetune-SAM's LoRA merged into the linears that it wraps.

`attn.qkv.qkv`, `attn.qkv.linear_{a,b}_{q,v}` → `attn.qkv`: rows of q and v += b @ a
`q_proj.proj`, `q_proj.w_a`, `q_proj.w_b`      → `q_proj`: W + w_b @ w_a; `v_proj` likewise
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import Tensor

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.layouts import FileLayout, Tensors
from medsa_deploy.exporters.lora import LoRA, Product, with_products

FACTOR = re.compile(
    r"(?P<qkv>image_encoder\.blocks\.\d+\.attn\.qkv)\.linear_(?P<ab>[ab])_(?P<row>[qv])\.weight"
    r"|(?P<linear>mask_decoder\.transformer\..*_proj)\.w_(?P<side>[ab])\.weight"
)
WRAPPED = {"qkv": "qkv", "linear": "proj"}
"""Name of the linear inside the wrapper."""
THIRDS = {"q": 0, "v": 2}


def merge(tensors: Tensors) -> tuple[dict[str, Tensor], tuple[LoRA, ...]]:
    """The tensors under the linears' plain names, every update merged, and what was merged.

    CheckpointError for an update that is incomplete or does not fit its weight.
    """
    plain: dict[str, Tensor] = {}
    factors: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if match := FACTOR.fullmatch(key):
            kind = "linear" if match["linear"] else "qkv"
            part = f"{match['ab'] or match['side']}{match['row'] or ''}"
            factors[match[kind], WRAPPED[kind]][part] = value
        else:
            plain[key] = value
    updates = []
    for (linear, inner), parts in factors.items():
        rows: tuple[str, ...] = ("q", "v") if inner == "qkv" else ("",)
        wrapped = f"{linear}.{inner}"
        lost = [_factor_key(linear, f"{ab}{row}") for row in rows for ab in "ab"
                if f"{ab}{row}" not in parts]  # fmt: skip
        lost += [] if f"{wrapped}.weight" in plain else [f"{wrapped}.weight"]
        if lost:
            raise CheckpointError(
                f"{linear} carries a low-rank update, but the checkpoint lacks {' and '.join(lost)}"
            )
        products = [
            Product(a=parts[f"a{row}"], b=parts[f"b{row}"], third=THIRDS.get(row)) for row in rows
        ]
        weight, update = with_products(linear, plain.pop(f"{wrapped}.weight"), products)
        plain[f"{linear}.weight"] = weight
        if f"{wrapped}.bias" in plain:
            plain[f"{linear}.bias"] = plain.pop(f"{wrapped}.bias")
        updates.append(update)
    return plain, tuple(updates)


def _factor_key(linear: str, part: str) -> str:
    """A factor's key: `ab` and the rows → the names of its wrapper."""
    return f"{linear}.linear_{part[0]}_{part[1]}" if part[1:] else f"{linear}.w_{part}"


LAYOUT = FileLayout(merge=merge)
