"""Invented checkpoints: keys and shapes of networks of any size, and checkpoints that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from golden_cases import GoldenCase, seeded

from medsa_deploy.bundle.manifest import Source
from medsa_deploy.exporters.checkpoint import Checkpoint

Keys = dict[str, tuple[int, ...]]
PARTS = ("weight", "bias")
Rows = Sequence[int | None]


def rows(depth: int, window: int, grid: int, global_blocks: Iterable[int]) -> list[int]:
    """Rows of each block's tables: 2·n − 1, n the window's side or the grid's."""
    return [2 * (grid if i in global_blocks else window) - 1 for i in range(depth)]


def vit_keys(
    *,
    width: int = 64,
    head_size: int = 16,
    tables: Rows = (27, 15, 27, 15),
    spelling: str = "rel_pos_",
    adapters: Mapping[str, Iterable[int]] | None = None,
    form: str = "meta",
    mask_tokens: int = 4,
    hyp: Mapping[int, Sequence[int]] | None = None,
) -> Keys:
    """Keys and shapes of a SAM ViT whose blocks have relative-position tables of `tables` rows.

    adapters: kind (Space, MLP, Depth) → blocks. hyp: two-way block → HyP-Adpt's prompt width, then
    its lengths.
    """
    keys: Keys = {
        "image_encoder.pos_embed": (1, 64, 64, width),
        "image_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "image_encoder.patch_embed.proj.bias": (width,),
        "image_encoder.neck.0.weight": (256, width, 1, 1),
        **_norm("image_encoder.neck.1", 256),
        "image_encoder.neck.2.weight": (256, 256, 3, 3),
        **_norm("image_encoder.neck.3", 256),
    }
    for i, length in enumerate(tables):
        block = f"image_encoder.blocks.{i}"
        if length is not None:
            keys |= {f"{block}.attn.{spelling}{axis}": (length, head_size) for axis in "hw"}
        keys |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        keys |= _linear(f"{block}.attn.qkv", 3 * width, width)
        keys |= _linear(f"{block}.attn.proj", width, width)
        keys |= _linear(f"{block}.mlp.lin1", 4 * width, width)
        keys |= _linear(f"{block}.mlp.lin2", width, 4 * width)
        for kind, blocks in (adapters or {}).items():
            if i in blocks:
                keys |= adapter_keys(f"{block}.{kind}_Adapter", width)
    keys |= _decoder(form, mask_tokens)
    for i, (prompt, *lengths) in (hyp or {}).items():
        keys |= _hyp(f"mask_decoder.transformer.layers.{i}", prompt, lengths)
    return keys


def efficient_keys(
    *,
    width: int = 64,
    depth: int = 2,
    grid: int | None = 6,
    spelling: str = "rel_pos_",
    adapted: bool = True,
) -> Keys:
    """Keys and shapes of an efficient_sam of up to 12 blocks; `grid` None: without tables."""
    sizes = {192: width, 576: 3 * width, 768: 4 * width, 48: width // 4, 31: 2 * (grid or 1) - 1}
    keys = _cut("medsa_efficient", {"blocks": depth}, adapted=adapted)
    encoder = {
        key.replace(".rel_", f".{spelling}"): tuple(sizes.get(n, n) for n in shape)
        for key, shape in keys.items()
        if key.startswith("image_encoder.") and (grid is not None or ".rel_" not in key)
    }
    return encoder | {k: v for k, v in keys.items() if not k.startswith("image_encoder.")}


def mobile_keys(*, depths: Sequence[int] = (1, 1, 1, 1), adapted: bool = True) -> Keys:
    """Keys and shapes of a mobile_sam whose stages have up to (2, 2, 6, 2) blocks."""
    stages = {f"layers.{i}.blocks": depth for i, depth in enumerate(depths)}
    return _cut("medsa_mobile", stages, adapted=adapted)


def low_rank_keys(keys: Keys, kind: str, rank: int) -> Keys:
    """Keys and shapes of updates, `lora` or `adalora`, of the linears the public code adapts."""
    parts: Keys = {}
    for key, shape in keys.items():
        if not re.match(r"image_encoder\..*\.(qkv|lin[12]|fc[12])\.weight$", key):
            continue
        linear, (out, inner) = key.removesuffix(".weight"), shape
        if kind == "adalora":
            parts |= {f"{linear}.lora_A": (rank, inner), f"{linear}.lora_E": (rank, 1)}
            parts |= {f"{linear}.lora_B": (out, rank), f"{linear}.ranknum": (1,)}
        elif linear.endswith("qkv"):
            parts |= {f"{linear}.lora_A": (2 * rank, inner), f"{linear}.lora_B": (2 * inner, rank)}
        else:
            parts |= {f"{linear}.lora_A": (rank, inner), f"{linear}.lora_B": (out, rank)}
    return parts


def med2d_keys(vit: Keys, blocks: Iterable[int]) -> Keys:
    """Keys and shapes of a SAM ViT with SAM-Med2D's adapters in some blocks."""
    width = vit["image_encoder.neck.0.weight"][1]
    keys = dict(vit)
    for i in blocks:
        prefix = f"image_encoder.blocks.{i}.Adapter"
        keys |= _norm(f"{prefix}.norm", width) | {
            f"{prefix}.channel.0.weight": (width // 4, width),
            f"{prefix}.channel.2.weight": (width, width // 4),
            f"{prefix}.spatial.0.weight": (width, width, 3, 3),
            f"{prefix}.spatial.2.weight": (width, width, 4, 4),
        }
    return keys


def finetune_keys(
    vit: Keys,
    *,
    layers: Iterable[int] = (),
    lora_blocks: Iterable[int] = (),
    lora_attentions: Iterable[str] = (),
    rank: int = 4,
) -> Keys:
    """A SAM ViT with finetune-SAM's adapters in two-way `layers`, and its LoRA.

    lora_attentions: such as `layers.0.self_attn` and `final_attn_token_to_image`.
    """
    keys = dict(vit)
    width = vit["image_encoder.neck.0.weight"][1]
    for i in layers:
        prefix = f"mask_decoder.transformer.layers.{i}"
        keys |= adapter_keys(f"{prefix}.Adapter", 256) | adapter_keys(f"{prefix}.MLP_Adapter", 256)
    for i in lora_blocks:
        qkv = f"image_encoder.blocks.{i}.attn.qkv"
        keys |= {f"{qkv}.qkv.{part}": keys.pop(f"{qkv}.{part}") for part in PARTS}
        for row in "qv":
            keys[f"{qkv}.linear_a_{row}.weight"] = (rank, width)
            keys[f"{qkv}.linear_b_{row}.weight"] = (width, rank)
    for attention in lora_attentions:
        for letter in "qv":
            name = f"mask_decoder.transformer.{attention}.{letter}_proj"
            out, inner = keys[f"{name}.weight"]
            keys |= {f"{name}.proj.{part}": keys.pop(f"{name}.{part}") for part in PARTS}
            keys |= {f"{name}.w_a.weight": (rank, inner), f"{name}.w_b.weight": (out, rank)}
    return keys


def samed_keys(base: Keys, classes: int, *, small: bool = False, rank: int = 4) -> Keys:
    """Keys and shapes of a SAMed file, or a SAMed_s file, that goes over a base."""
    width = base["image_encoder.neck.0.weight"][1]
    depth = len({key.split(".")[2] for key in base if ".blocks." in key})
    keys: Keys = {f"w_a_{i:03d}": (rank, width) for i in range(2 * depth)}
    keys |= {f"w_b_{i:03d}": (width, rank) for i in range(2 * depth)}
    transformer = "mask_decoder.transformer."
    decoder = _decoder("meta", classes + 1)
    keys |= {
        key: shape
        for key, shape in decoder.items()
        if not key.startswith("image_encoder.") and not (small and key.startswith(transformer))
    }
    if small:
        for kind, out in {"sa": 256, "cti": 128, "cit": 128}.items():
            for i in range(4):
                keys |= {f"{kind}_a_{i:03d}": (rank, 256), f"{kind}_b_{i:03d}": (out, rank)}
        for row in "qv":
            keys |= {f"fati_{row}a": (rank, 256), f"fati_{row}b": (128, rank)}
    return keys


def own_efficient_keys(*, width: int = 64, depth: int = 2) -> Keys:
    """Keys and shapes of EfficientSAM's own weights."""
    sizes = {192: width, 576: 3 * width, 768: 4 * width}
    return {
        key: tuple(sizes.get(n, n) for n in shape) if key.startswith("image_enc") else shape
        for key, shape in _cut("efficientsam_official", {"blocks": depth}, adapted=True).items()
    }


def _cut(case: str, depths: Mapping[str, int], *, adapted: bool) -> Keys:
    """A golden case's keys without the blocks beyond `depths`, with or without adapters."""

    def is_kept(key: str) -> bool:
        for blocks, depth in depths.items():
            numbered = re.match(rf"image_encoder\.{re.escape(blocks)}\.(\d+)\.", key)
            if numbered and int(numbered[1]) >= depth:
                return False
        return adapted or "_Adapter." not in key

    keys = GoldenCase(case).settings["keys"].items()
    return {key: tuple(shape) for key, shape in keys if is_kept(key)}


def adapter_keys(prefix: str, width: int) -> Keys:
    """An adapter with a hidden layer of a quarter of its width."""
    down, up = f"{prefix}.D_fc1", f"{prefix}.D_fc2"
    return _linear(down, width // 4, width) | _linear(up, width, width // 4)


def weights(keys: Keys, *, rel_pos: float = 0.0, seed: int = 5) -> dict[str, torch.Tensor]:
    """Seeded weights; `rel_pos` scales the relative-position tables."""
    state = seeded.state_dict(keys, seed, rel_pos_scale=rel_pos)
    return {key: torch.from_numpy(value) for key, value in state.items()}


def hollow(keys: Keys, *, public_training: bool = False) -> Checkpoint:
    """A checkpoint of zeros that take no memory, for whatever is read from keys and shapes."""
    return checkpoint(
        {key: torch.zeros(()).expand(shape) for key, shape in keys.items()},
        public_training=public_training,
    )


def checkpoint(tensors: Mapping[str, torch.Tensor], *, public_training: bool = False) -> Checkpoint:
    """Tensors as a checkpoint that was read from a file."""
    source = Source(checkpoint="x.pth", sha256="0" * 64, container="state dict", dtype="float32")
    return Checkpoint(source=source, tensors=tensors, public_training=public_training, notes=())


def _decoder(form: str, mask_tokens: int) -> Keys:
    """Prompt encoder and decoder: a golden case's, in either form, with any number of tokens."""
    keys: Keys = {}
    mlps = "mask_decoder.output_hypernetworks_mlps"
    for key, shape in GoldenCase("medsa_2d").settings["keys"].items():
        if key.startswith(f"{mlps}.0."):
            keys |= {key.replace(".0.", f".{i}.", 1): tuple(shape) for i in range(mask_tokens)}
        elif not key.startswith((mlps, "image_encoder.")):
            meta = key.replace(".mlp.layers.0.0.", ".mlp.lin1.").replace(".mlp.fc.", ".mlp.lin2.")
            keys[meta if form == "meta" else key] = tuple(shape)
    keys["mask_decoder.mask_tokens.weight"] = (mask_tokens, 256)
    return keys | _linear("mask_decoder.iou_prediction_head.layers.2", mask_tokens, 256)


def _hyp(block: str, prompt: int, lengths: Sequence[int]) -> Keys:
    """The three decoder adapters of a two-way block."""
    prefix = f"{block}.HyP_Adapter"
    keys = adapter_keys(f"{block}.MLP_Adapter", 256) | adapter_keys(f"{block}.Image_Adapter", 256)
    keys |= _linear(f"{prefix}.D_fc1", lengths[0], 256) | _linear(f"{prefix}.P_fc", prompt, 256)
    for k, (a, b) in enumerate(pairwise(lengths)):
        keys |= _linear(f"{prefix}.hyper.{k}", a * b, prompt) | _norm(f"{prefix}.norms.{k}", b)
    return keys | _linear(f"{prefix}.D_fc2", 256, lengths[-1])


def _linear(name: str, out: int, inner: int) -> Keys:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Keys:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
