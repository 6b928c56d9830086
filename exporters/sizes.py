"""The keys every size of a network is read from: which must be there, and how they must agree.

These keys decide what all others must look like, so they are checked first: a network built from a
wrong one would crash or, worse, agree with itself. A table says, key by key, the expected shape.
`#` in a key stands for every index there is. In a shape a number is itself, a name is one size
wherever it stands, and `*` is any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from medsa_deploy.bundle.manifest import TwoWay
from medsa_deploy.errors import CheckpointError

from .shapes import Shapes

Kind = Literal["vit", "tiny_vit", "efficient_sam"]
"""Networks by what their keys are called: SAM's, those with a TinyViT, EfficientSAM."""

VIT = {
    "image_encoder.patch_embed.proj.weight": "C 3 p p",
    "image_encoder.pos_embed": "1 * * C",
    "image_encoder.blocks.#.mlp.lin1.weight": "* C",
    "image_encoder.neck.0.weight": "256 C 1 1",
}

TINY_VIT = {
    "image_encoder.patch_embed.seq.0.c.weight": "c 3 k k",
    "image_encoder.patch_embed.seq.2.c.weight": "W0 c k k",
    "image_encoder.layers.0.blocks.#.conv1.c.weight": "H W0 1 1",
    "image_encoder.layers.0.blocks.#.conv2.c.weight": "H 1 3 3",
    "image_encoder.layers.0.blocks.#.conv3.c.weight": "W0 H 1 1",
    "image_encoder.neck.0.weight": "256 W3 1 1",
}
for _i in range(3):
    TINY_VIT |= {
        f"image_encoder.layers.{_i}.downsample.conv1.c.weight": f"W{_i + 1} W{_i} 1 1",
        f"image_encoder.layers.{_i}.downsample.conv2.c.weight": f"W{_i + 1} 1 3 3",
        f"image_encoder.layers.{_i}.downsample.conv3.c.weight": f"W{_i + 1} W{_i + 1} 1 1",
        f"image_encoder.layers.{_i + 1}.blocks.#.attn.norm.weight": f"W{_i + 1}",
        f"image_encoder.layers.{_i + 1}.blocks.#.attn.attention_biases": f"h{_i + 1} o{_i + 1}",
        f"image_encoder.layers.{_i + 1}.blocks.#.local_conv.c.weight": f"W{_i + 1} 1 3 3",
        f"image_encoder.layers.{_i + 1}.blocks.#.mlp.fc1.weight": f"* W{_i + 1}",
    }

SAM_DECODER = {
    "prompt_encoder.mask_downscaling.3.weight": "* * 2 2",
    "prompt_encoder.no_mask_embed.weight": "1 256",
    "mask_decoder.iou_prediction_head.layers.0.weight": "* 256",
}
EFFICIENT_SAM_DECODER = {
    "prompt_encoder.invalid_points.weight": "1 256",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "2 128",
    "mask_decoder.mask_tokens.weight": "M 256",
    "mask_decoder.final_output_upscaling_layers.0.0.weight": "256 u 2 2",
    "mask_decoder.final_output_upscaling_layers.1.0.weight": "u v 2 2",
    "mask_decoder.output_hypernetworks_mlps.#.layers.0.0.weight": "m 256",
    "mask_decoder.output_hypernetworks_mlps.#.fc.weight": "v m",
    "mask_decoder.iou_prediction_head.layers.0.0.weight": "i 256",
    "mask_decoder.iou_prediction_head.fc.weight": "M i",
}
TRANSFORMER = {
    "mask_decoder.mask_tokens.weight": "* 256",
    "mask_decoder.transformer.layers.#.self_attn.q_proj.weight": "* 256",
    "mask_decoder.transformer.layers.#.cross_attn_token_to_image.q_proj.weight": "* 256",
    "mask_decoder.transformer.layers.#.cross_attn_image_to_token.q_proj.weight": "* 256",
    "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight": "* 256",
    "mask_decoder.transformer.norm_final_attn.weight": "256",
}
TWO_WAY_MLP = {
    "meta": {"mask_decoder.transformer.layers.#.mlp.lin1.weight": "* 256"},
    "public": {"mask_decoder.transformer.layers.#.mlp.layers.0.0.weight": "* 256"},
}

REQUIRED: dict[Kind, dict[str, str]] = {
    "vit": VIT | SAM_DECODER | TRANSFORMER,
    "tiny_vit": TINY_VIT | SAM_DECODER | TRANSFORMER,
    "efficient_sam": VIT
    | {"image_encoder.pos_embed": "1 197 C"}  # a class token and 14×14
    | TRANSFORMER
    | EFFICIENT_SAM_DECODER,
}

OPTIONAL = {
    "image_encoder.blocks.#.attn.rel_pos_h": "* d",
    "image_encoder.blocks.#.attn.rel_pos_w": "* d",
    "image_encoder.blocks.#.Space_Adapter.D_fc1.weight": "* C",
    "image_encoder.blocks.#.MLP_Adapter.D_fc1.weight": "* C",
    "image_encoder.blocks.#.Depth_Adapter.D_fc1.weight": "* C",
    "mask_decoder.transformer.layers.#.HyP_Adapter.D_fc1.weight": "* 256",
    "mask_decoder.transformer.layers.#.HyP_Adapter.P_fc.weight": "* 256",
    "mask_decoder.transformer.layers.#.HyP_Adapter.norms.#.weight": "*",
    "mask_decoder.transformer.layers.#.MLP_Adapter.D_fc1.weight": "* 256",
    "mask_decoder.transformer.layers.#.Image_Adapter.D_fc1.weight": "* 256",
}
for _i in range(1, 4):
    OPTIONAL |= {
        f"image_encoder.layers.{_i}.blocks.#.Space_Adapter.D_fc1.weight": f"* W{_i}",
        f"image_encoder.layers.{_i}.blocks.#.MLP_Adapter.D_fc1.weight": f"* W{_i}",
    }


def checked(shapes: Shapes, kind: Kind, form: TwoWay) -> Shapes:
    """`shapes`, fit to build a network from; CheckpointError lists what is missing or wrong.

    A key that one block lacks and another has is borrowed from that one: the network can then be
    built, and everything the checkpoint lacks be listed.
    """
    required = REQUIRED[kind] | TWO_WAY_MLP[form]
    borrowed: dict[str, tuple[int, ...]] = {}
    missing: list[str] = []
    for pattern in required:
        keys = list(_keys(pattern, shapes))
        there = [shapes[key] for key in keys if key in shapes]
        absent = [key for key in keys if key not in shapes]
        borrowed |= {key: there[0] for key in absent if there}
        missing += [] if there else absent
    other = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
    halves = [key.rpartition(".") for key in shapes if key.endswith(tuple(other))]
    missing += [k for block, _, table in halves if (k := f"{block}.{other[table]}") not in shapes]
    if problems := misfit(shapes, missing=missing, wrong=list(_wrong(required | OPTIONAL, shapes))):
        raise CheckpointError(f"the checkpoint is not a network known here. {problems}")
    return Shapes(dict(shapes) | borrowed)


def misfit(
    shapes: Shapes,
    *,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> str:
    """What does not fit, in one line; empty if nothing."""
    groups = {"missing keys": missing, "unknown keys": unknown, "wrong shapes": wrong}
    text = "; ".join(f"{what}: {listed(names)}" for what, names in groups.items() if names)
    if missing and any("_Adapter." in key for key in shapes):
        text += ". An adapter-only file needs --base FILE, the SAM checkpoint it was trained on"
    return text


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names, with those that differ only by a block's number written once."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    parts = [
        same[0] if len(same) == 1 else f"{merged} ({len(same)}×)" for merged, same in alike.items()
    ]
    more = f" and {len(parts) - limit} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more


def _wrong(table: Mapping[str, str], shapes: Shapes) -> Iterator[str]:
    """Keys whose shape is not the table's, each with what was expected."""
    sizes: dict[str, int] = {}
    for pattern, text in table.items():
        wanted = text.split()
        for key in _keys(pattern, shapes):
            shape = shapes.get(key)
            if shape is None:
                continue
            if len(shape) == len(wanted) and all(shape):
                for name, size in zip(wanted, shape, strict=True):
                    sizes.setdefault(name, int(name) if name.isdecimal() else size)
                if all(n == "*" or sizes[n] == s for n, s in zip(wanted, shape, strict=True)):
                    continue
            expected = ", ".join(str(sizes.get(n, n)) if n != "*" else "any" for n in wanted)
            yield f"{key} is {shape}, expected ({expected})"


def _keys(pattern: str, shapes: Shapes) -> Iterator[str]:
    """The keys a pattern stands for; with no index at all, index 0."""
    prefix, hash_, rest = pattern.partition(".#")
    if not hash_:
        yield pattern
        return
    for index in range(max(1, shapes.count(prefix))):
        yield from _keys(f"{prefix}.{index}{rest}", shapes)
