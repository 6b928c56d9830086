"""A checkpoint's keys and shapes → the network's facts and conventions, with every guess named.

Nothing is inferred from a file's name. A fact the shapes do not settle is a `Guess`: it is printed,
and says which option overrules it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.manifest import (
    Conventions,
    Family,
    Network,
    Outputs,
    PointFrame,
    PointOrder,
    ProfileName,
    RelPos,
    TwoWay,
)

from .checkpoint import Checkpoint
from .reference.network import ReferenceNetwork
from .shapes import Shapes

GLOBAL_LAYOUTS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}
"""Global blocks of SAM's ViT-B, L and H by depth."""
SAM_WINDOW = 14
SAM_IMAGE_SIZE = 1024
LITE_IMAGE_SIZE = 256

UNUSED = re.compile(
    r"num_batches_tracked$|attention_bias_idxs$|^pixel_(mean|std)$"
    r"|^image_encoder\.(norm_head|head)\."
    r"|^image_encoder\.blocks\.\d+\.Depth_Adapter\."
)
"""Keys a checkpoint may carry that its network, used in 2D, does not run."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a user may set where a checkpoint does not say, or against what it suggests."""

    heads: int | None = None
    window_size: int | None = None
    global_blocks: tuple[int, ...] | None = None
    image_size: int | None = None
    classes: int | None = None
    preprocess: ProfileName | None = None
    intensity_window: tuple[float, float] | None = None
    point_order: PointOrder | None = None
    point_frame: PointFrame | None = None
    threshold: float | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A fact the checkpoint does not settle."""

    fact: str
    value: str
    because: str
    option: str
    """The option that overrules it."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a checkpoint is, and how sure we are."""

    network: Network
    conventions: Conventions
    guesses: tuple[Guess, ...]


def infer(checkpoint: Checkpoint, overrides: Overrides) -> Architecture:
    """The network's facts and conventions; CheckpointError lists keys that do not fit them."""
    shapes = checkpoint.shapes
    _refuse_unsupported(shapes)
    guesses: list[Guess] = []
    if "image_encoder.layers.0.blocks.0.conv1.c.weight" in shapes:
        encoder = _tiny_vit(shapes, overrides)
    else:
        encoder = _vit(shapes, overrides, guesses)
    network = _network(checkpoint, shapes, encoder, overrides, guesses)
    _check_keys(checkpoint.tensors, network, shapes)
    conventions = _conventions(checkpoint, network, overrides, guesses)
    return Architecture(network=network, conventions=conventions, guesses=tuple(guesses))


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """The encoder's part of `Network`."""

    kind: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    image_size: int
    patch_size: int


def _refuse_unsupported(shapes: Shapes) -> None:
    """Networks that are recognised, and said to be so, but not exported yet."""
    found = None
    if any(".lora_" in key for key in shapes):
        found = "a LoRA or AdaLoRA variant"
    elif "prompt_encoder.invalid_points.weight" in shapes:
        found = "efficient_sam"
    elif shapes.get("image_encoder.patch_embed.seq.0.c.weight", (0, 0, 1, 1))[2:] != (1, 1):
        found = "mobile_sam"
    if found:
        raise CheckpointError(f"this checkpoint is {found}, which is not supported yet")


def _tiny_vit(shapes: Shapes, overrides: Overrides) -> _Encoder:
    """LiteMedSAM: everything but the image size is in the shapes."""
    for option in ("heads", "window_size", "global_blocks"):
        if getattr(overrides, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for SAM ViTs; this is a TinyViT")
    prefix = "image_encoder.layers"
    stages = range(shapes.count(prefix))
    tables = [shapes.get(f"{prefix}.{i}.blocks.0.attn.attention_biases", (0, 0)) for i in stages]
    widths = [
        shapes.get(f"{prefix}.{i}.blocks.0.attn.norm.weight")
        or shapes[f"{prefix}.{i}.blocks.0.conv3.c.weight"]
        for i in stages
    ]
    return _Encoder(
        kind="tiny_vit",
        widths=tuple(width[0] for width in widths),
        depths=tuple(shapes.count(f"{prefix}.{i}.blocks") for i in stages),
        heads=tuple(table[0] for table in tables),
        windows=tuple(isqrt(table[1]) for table in tables),
        global_blocks=(),
        image_size=overrides.image_size or LITE_IMAGE_SIZE,
        patch_size=4,
    )


def _vit(shapes: Shapes, overrides: Overrides, guesses: list[Guess]) -> _Encoder:
    """A SAM ViT: heads, windows and image size from the relative-position tables."""
    width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    depth = shapes.count("image_encoder.blocks")
    tables = [shapes.get(f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    rows = [None if table is None else table[0] for table in tables]
    window, grid = _window_and_grid(rows, patch, overrides, guesses)
    return _Encoder(
        kind="vit",
        widths=(width,),
        depths=(depth,),
        heads=(_heads(width, tables, overrides, guesses),),
        windows=(window,),
        global_blocks=_global_blocks(rows, window, grid, overrides, guesses),
        image_size=grid * patch,
        patch_size=patch,
    )


def _heads(
    width: int,
    tables: list[tuple[int, ...] | None],
    overrides: Overrides,
    guesses: list[Guess],
) -> int:
    """Attention heads: width over the tables' width, else SAM's head sizes."""
    head_sizes = {table[1] for table in tables if table is not None}
    if overrides.heads is not None:
        heads = overrides.heads
    elif len(head_sizes) == 1:
        heads = width // head_sizes.pop()
    else:
        heads = width // (80 if width == 1280 else 64)
        guesses.append(
            Guess(
                fact="heads",
                value=str(heads),
                because="no relative-position tables; SAM's head size for this width",
                option="--heads",
            )
        )
    if heads < 1 or width % heads:
        raise UsageError(f"{heads} attention heads do not divide the embedding width {width}")
    if head_sizes and head_sizes != {width // heads}:
        raise UsageError(
            f"--heads {heads} gives a head size of {width // heads}, but the relative-position "
            f"tables are {sorted(head_sizes)} wide"
        )
    return heads


def _window_and_grid(
    rows: list[int | None], patch: int, overrides: Overrides, guesses: list[Guess]
) -> tuple[int, int]:
    """Window and token grid: a table has 2·window − 1 or 2·grid − 1 rows."""
    lengths = sorted({n for n in rows if n is not None})
    window = overrides.window_size
    if window is None:
        plain = 2 * SAM_WINDOW - 1
        window = SAM_WINDOW if plain in lengths or len(lengths) != 2 else (lengths[0] + 1) // 2
    if window < 1:
        raise UsageError(f"--window-size {window} is not a window")
    if overrides.image_size is not None:
        if overrides.image_size < patch or overrides.image_size % patch:
            raise UsageError(f"--image-size must be a multiple of the patch size {patch}")
        return window, overrides.image_size // patch
    others = [n for n in lengths if n != 2 * window - 1]
    if len(others) > 1:
        raise CheckpointError(
            f"relative-position tables of {', '.join(map(str, lengths))} rows do not show the image "
            "size: give --image-size and --window-size"
        )
    if others or lengths:
        return window, ((others or lengths)[0] + 1) // 2
    guesses.append(
        Guess(
            fact="image size",
            value=str(SAM_IMAGE_SIZE),
            because="no relative-position tables; SAM's size",
            option="--image-size",
        )
    )
    return window, SAM_IMAGE_SIZE // patch


def _global_blocks(
    rows: list[int | None], window: int, grid: int, overrides: Overrides, guesses: list[Guess]
) -> tuple[int, ...]:
    """Blocks that attend over the whole grid: those whose tables are not a window's."""
    depth = len(rows)
    if overrides.global_blocks is not None:
        if outside := [i for i in overrides.global_blocks if not 0 <= i < depth]:
            raise UsageError(f"--global-blocks {outside} are not among blocks 0…{depth - 1}")
        return tuple(sorted(set(overrides.global_blocks)))
    if grid != window and None not in rows:
        return tuple(i for i, n in enumerate(rows) if n != 2 * window - 1)
    if depth not in GLOBAL_LAYOUTS:
        raise CheckpointError(
            f"the tables of this {depth}-block encoder do not tell windowed from global blocks: "
            "give --global-blocks"
        )
    guesses.append(
        Guess(
            fact="global blocks",
            value=", ".join(map(str, GLOBAL_LAYOUTS[depth])),
            because=f"the tables cannot tell; SAM's layout for {depth} blocks",
            option="--global-blocks",
        )
    )
    return GLOBAL_LAYOUTS[depth]


def _network(
    checkpoint: Checkpoint,
    shapes: Shapes,
    encoder: _Encoder,
    overrides: Overrides,
    guesses: list[Guess],
) -> Network:
    """All facts about the network."""
    adapters = _adapters(shapes)
    two_way = _two_way(shapes)
    outputs: Outputs = (
        "classes" if encoder.kind == "vit" and (adapters or two_way == "public") else "sam"
    )
    mask_tokens = shapes["mask_decoder.mask_tokens.weight"][0]
    used = {k: v for k, v in checkpoint.tensors.items() if not UNUSED.search(k)}
    adapted = {k: v for k, v in used.items() if "_Adapter." in k}
    lengths, prompt_length = _hyp_lengths(shapes)
    family: Family = "medsa" if adapters else "litemedsam" if encoder.kind == "tiny_vit" else "sam"
    return Network(
        family=family,
        encoder="tiny_vit" if encoder.kind == "tiny_vit" else "vit",
        widths=encoder.widths,
        depths=encoder.depths,
        heads=encoder.heads,
        windows=encoder.windows,
        global_blocks=encoder.global_blocks,
        image_size=encoder.image_size,
        embedding_size=encoder.image_size // encoder.patch_size,
        patch_size=encoder.patch_size,
        rel_pos=_rel_pos(checkpoint.tensors),
        adapters=adapters,
        parameters=sum(v.numel() for v in used.values()),
        adapter_parameters=sum(v.numel() for v in adapted.values()),
        two_way=two_way,
        mask_tokens=mask_tokens,
        classes=_classes(mask_tokens, outputs, overrides, guesses),
        outputs=outputs,
        hyp_lengths=lengths,
        hyp_prompt_length=prompt_length,
    )


def _adapters(shapes: Shapes) -> tuple[str, ...]:
    """Kinds of adapter that run in 2D."""
    marks = {
        "space": r"image_encoder\..*\.Space_Adapter\.",
        "mlp": r"image_encoder\..*\.MLP_Adapter\.",
        "hyp": r"mask_decoder\..*\.HyP_Adapter\.",
        "decoder-mlp": r"mask_decoder\..*\.MLP_Adapter\.",
        "decoder-image": r"mask_decoder\..*\.Image_Adapter\.",
    }
    return tuple(kind for kind, mark in marks.items() if any(re.match(mark, key) for key in shapes))


def _two_way(shapes: Shapes) -> TwoWay:
    """Form of the two-way blocks, by the names of their MLP's keys."""
    public = any(
        ".mlp.layers.0.0." in k for k in shapes if k.startswith("mask_decoder.transformer")
    )
    return "public" if public else "meta"


def _rel_pos(tensors: Mapping[str, Tensor]) -> RelPos:
    """Whether any relative-position table holds a bias. Zeros are exact, never repaired."""
    tables = [v for k, v in tensors.items() if re.search(r"\.attn\.rel_pos_[hw]$", k)]
    if not tables:
        return "none"
    return "real" if any(bool(torch.count_nonzero(table)) for table in tables) else "zero"


def _hyp_lengths(shapes: Shapes) -> tuple[tuple[int, ...], int]:
    """HyP-Adpt's widths L_0…L_K and prompt width, of the first two-way block."""
    prefix = "mask_decoder.transformer.layers.0.HyP_Adapter"
    if f"{prefix}.D_fc1.weight" not in shapes:
        return (), 0
    steps = range(shapes.count(f"{prefix}.norms"))
    lengths = (shapes[f"{prefix}.D_fc1.weight"][0],) + tuple(
        shapes[f"{prefix}.norms.{k}.weight"][0] for k in steps
    )
    return lengths, shapes[f"{prefix}.P_fc.weight"][0]


def _classes(mask_tokens: int, outputs: Outputs, overrides: Overrides, guesses: list[Guess]) -> int:
    """N: not stored, but a decoder has max(4, N) mask tokens."""
    if outputs == "sam":
        if overrides.classes not in (None, 1):
            raise UsageError(
                "--classes is for networks of the public Med-SA code; this one has SAM's"
            )
        return 1
    if mask_tokens > 4 and overrides.classes in (None, mask_tokens):
        return mask_tokens
    if overrides.classes is None:
        guesses.append(
            Guess(
                fact="classes",
                value="1",
                because="a decoder with 4 mask tokens may have 1 to 4 classes",
                option="--classes",
            )
        )
        return 1
    if not 1 <= overrides.classes <= mask_tokens or mask_tokens > 4:
        raise UsageError(
            f"--classes {overrides.classes} does not fit a decoder with {mask_tokens} mask tokens"
        )
    return overrides.classes


def _conventions(
    checkpoint: Checkpoint, network: Network, overrides: Overrides, guesses: list[Guess]
) -> Conventions:
    """Defaults by where the checkpoint comes from (`medsa.md` §5), each of them a guess."""
    public = checkpoint.public_training or network.adapters or network.two_way == "public"
    preprocess: ProfileName
    order: PointOrder = "xy"
    if network.family == "litemedsam":
        preprocess, why = "litemedsam", "LiteMedSAM's network"
    elif public:
        preprocess, order, why = "medsa", "yx", "trained by the public Med-SA code"
    else:
        preprocess, why = "sam", "SAM's keys; MedSAM's files look the same and need medsam"
    if overrides.preprocess is None:
        guesses.append(
            Guess(fact="preprocess", value=preprocess, because=why, option="--preprocess")
        )
    if overrides.point_order is None:
        because = "clicks were sampled as (row, column)" if order == "yx" else why.split(";")[0]
        guesses.append(
            Guess(fact="point order", value=order, because=because, option="--point-order")
        )
    names = overrides.class_names or ()
    if names and len(names) != network.classes:
        raise UsageError(
            f"--class-names has {len(names)} names ({', '.join(names)}) for {network.classes} "
            "class(es): set --classes to match"
        )
    return Conventions(
        preprocess=overrides.preprocess or preprocess,
        point_order=overrides.point_order or order,
        point_frame=overrides.point_frame or "network",
        intensity_window=overrides.intensity_window,
        threshold=0.5 if overrides.threshold is None else overrides.threshold,
        class_names=names,
    )


def _check_keys(tensors: Mapping[str, Tensor], network: Network, shapes: Shapes) -> None:
    """CheckpointError listing keys that are unknown, missing, or of the wrong shape."""
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in ReferenceNetwork(network, shapes).state_dict().items()}
    missing = [k for k in wanted if k not in tensors and not UNUSED.search(k)]
    unknown = [k for k in tensors if k not in wanted and not UNUSED.search(k)]
    wrong = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(wanted[k])}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k]
    ]
    groups = {"missing keys": missing, "unknown keys": unknown, "wrong shapes": wrong}
    problems = [f"{what}: {_listed(names)}" for what, names in groups.items() if names]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the network its shapes suggest ({network.family}, "
            f"{sum(network.depths)} blocks of width {network.widths[-1]}). " + "; ".join(problems)
        )


def _listed(names: list[str], limit: int = 12) -> str:
    """Names, with those that differ only by a block's number written once."""
    merged = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    parts = [name if n == 1 else f"{name} ({n}×)" for name, n in merged.items()]
    more = f" and {len(parts) - limit} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more
