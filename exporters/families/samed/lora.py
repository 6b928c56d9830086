"""SAMed's file over its base: which tensors of the base are used, and LoRA merged into them.

w_{a,b}_k      qkv of block k // 2: rows of q for even k, of v for odd k
sa_{a,b}_k     q_proj (even k) and v_proj (odd k) of the self-attention of layer k // 2
cti_{a,b}_k    of its attention from tokens to the image
cit_{a,b}_k    of its attention from the image to tokens
fati_{q,v}{a,b}  of the final attention

W + b @ a, unscaled. Numbers have three digits. The decoder's updates are SAMed_s's, whose file
leaves the decoder's transformer to the base.
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import Tensor

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.layouts import BaseTensors, FileLayout, Tensors
from medsa_deploy.exporters.lora import LoRA, Product, with_products

NUMBERED = re.compile(r"(w|sa|cti|cit)_([ab])_([0-9]{3,6})")
FINAL = re.compile(r"fati_([qv])([ab])")
TRANSFORMER = "mask_decoder.transformer."
ATTENTIONS = {
    "sa": "self_attn",
    "cti": "cross_attn_token_to_image",
    "cit": "cross_attn_image_to_token",
}


def merge(tensors: Tensors) -> tuple[dict[str, Tensor], tuple[LoRA, ...]]:
    """The tensors with every update merged, and what was merged.

    CheckpointError for an update that is incomplete, or does not fit its weight, and for another
    number of encoder updates than two for each block: the file does not say which block each is of.
    """
    merged: dict[str, Tensor] = {}
    factors: dict[tuple[str, str], dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for key, value in tensors.items():
        if place := _place(key):
            linear, row, side = place
            factors[linear, row][side] = (key, value)
        else:
            merged[key] = value
    _check_pairs(factors)
    _check_blocks(factors, merged)
    by_linear: dict[str, list[Product]] = defaultdict(list)
    for (linear, row), pair in sorted(factors.items()):
        third = {"q": 0, "v": 2, "": None}[row]
        by_linear[linear].append(Product(a=pair["a"][1], b=pair["b"][1], third=third))
    updates = []
    for linear, products in by_linear.items():
        key = f"{linear}.weight"
        if key not in merged:
            raise CheckpointError(
                f"there is a low-rank update of {linear}, but no {key}: give the SAM checkpoint "
                "that the file was trained on with --base FILE"
            )
        merged[key], update = with_products(linear, merged[key], products)
        updates.append(update)
    return merged, tuple(updates)


def under(adapters: Tensors, base: Tensors, name: str) -> BaseTensors:
    """The base's image encoder, and the decoder's transformer if the file has none.

    Adapters that the base itself has are left out: SAMed's network has no place for them.
    """
    brings_transformer = any(key.startswith(TRANSFORMER) for key in adapters)
    modules = {key.partition(".")[0] for key in adapters if "." in key}

    def is_used(key: str) -> bool:
        if "_Adapter." in key:
            return False
        if key.startswith(TRANSFORMER):
            return not brings_transformer
        return key.partition(".")[0] not in modules

    return BaseTensors(tensors={key: value for key, value in base.items() if is_used(key)})


def _place(key: str) -> tuple[str, str, str] | None:
    """A factor's linear, its rows of a fused projection (`q`, `v`, or none), and its side."""
    if match := FINAL.fullmatch(key):
        return f"{TRANSFORMER}final_attn_token_to_image.{match[1]}_proj", "", match[2]
    if not (match := NUMBERED.fullmatch(key)):
        return None
    kind, side, number = match[1], match[2], int(match[3])
    row = "qv"[number % 2]
    if kind == "w":
        return f"image_encoder.blocks.{number // 2}.attn.qkv", row, side
    return f"{TRANSFORMER}layers.{number // 2}.{ATTENTIONS[kind]}.{row}_proj", "", side


def _check_pairs(factors: dict[tuple[str, str], dict[str, tuple[str, Tensor]]]) -> None:
    for (linear, _), pair in factors.items():
        if len(pair) < 2:
            ((key, _),) = pair.values()
            raise CheckpointError(f"{key} is half of a low-rank update of {linear}: expected two")


def _check_blocks(
    factors: dict[tuple[str, str], dict[str, tuple[str, Tensor]]], tensors: Tensors
) -> None:
    count = sum(row != "" for _, row in factors)
    blocks = {key.split(".")[2] for key in tensors if key.startswith("image_encoder.blocks.")}
    if count and blocks and count != 2 * len(blocks):
        raise CheckpointError(
            f"there are {count} low-rank updates w_a, but the encoder has {len(blocks)} blocks: "
            "expected one of q and one of v for each; the file does not say which blocks have some"
        )


LAYOUT = FileLayout(merge=merge, adapter_keys=re.compile(r"^w_[ab]_\d+$"), under=under)
