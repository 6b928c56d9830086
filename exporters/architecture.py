"""A checkpoint's keys and shapes → the network's facts and conventions, with every guess named.

Nothing is inferred from a file's name. A fact the shapes do not settle is a `Guess`: it is printed,
and says which option overrules it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from medsa_deploy.bundle.manifest import Conventions, Family, Network, Outputs, RelPos, TwoWay
from medsa_deploy.errors import CheckpointError, UsageError

from . import encoders, sizes
from .checkpoint import Checkpoint
from .conventions import conventions_of
from .depth import DepthFacts, depth_of
from .encoders import EncoderFacts
from .guesses import Guess, Overrides
from .reference.network import ReferenceNetwork
from .shapes import Shapes
from .sizes import Kind

__all__ = ["Architecture", "Guess", "Overrides", "infer"]

ENCODERS: Mapping[Kind, Callable[[Shapes, Overrides, list[Guess]], EncoderFacts]] = {
    "vit": encoders.vit,
    "tiny_vit": encoders.tiny_vit,
    "efficient_sam": encoders.efficient_sam,
}

EFFICIENT_SAM_PROMPTS = ("prompt_encoder.invalid_points.", "prompt_encoder.bbox_")
"""What only EfficientSAM's keys begin with."""

UNUSED = re.compile(
    r"num_batches_tracked$|attention_bias_idxs$|^pixel_(mean|std)$"
    r"|^image_encoder\.(norm_head|head)\."
    r"|^image_encoder\.layers\.\d+\.blocks\.\d+\.Depth_Adapter\."
)
"""Keys a checkpoint may carry that its network does not run."""
DEPTH = re.compile(r"^image_encoder\.blocks\.\d+\.Depth_Adapter\.")
"""Keys that a network runs in 3D only."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a checkpoint is, and how sure we are."""

    network: Network
    conventions: Conventions
    guesses: tuple[Guess, ...]


def infer(checkpoint: Checkpoint, overrides: Overrides) -> Architecture:
    """The network's facts and conventions; CheckpointError lists keys that do not fit them."""
    shapes = checkpoint.shapes
    kind = _kind(shapes)
    guesses: list[Guess] = []
    if checkpoint.lora and kind != "tiny_vit" and overrides.image_size is None:
        raise UsageError(
            "a LoRA checkpoint does not show its image size (its tables always have 127 rows): "
            "give --image-size"
        )
    whole = sizes.checked(shapes, kind, _two_way(shapes, kind))
    encoder = ENCODERS[kind](whole, overrides, guesses)
    depth = depth_of(shapes, kind, overrides, guesses)
    network = _network(checkpoint, shapes, kind, encoder, depth, overrides, guesses)
    _check_keys(checkpoint.tensors, network, whole)
    conventions = conventions_of(
        network, overrides, guesses, public_training=checkpoint.public_training
    )
    return Architecture(network=network, conventions=conventions, guesses=tuple(guesses))


def _network(
    checkpoint: Checkpoint,
    shapes: Shapes,
    kind: Kind,
    encoder: EncoderFacts,
    depth: DepthFacts,
    overrides: Overrides,
    guesses: list[Guess],
) -> Network:
    """All facts about the network."""
    tensors = checkpoint.tensors
    in_3d = depth.sd_trans is not None
    adapters = _adapters(shapes, in_3d=in_3d)
    adapters += tuple(sorted({one.kind.split()[0] for one in checkpoint.lora}))
    two_way = _two_way(shapes, kind)
    public = kind == "vit" and (adapters or two_way == "public")
    outputs: Outputs = "classes" if public else "sam"
    mask_tokens = shapes["mask_decoder.mask_tokens.weight"][0]
    used = {k: v.numel() for k, v in tensors.items() if not _unused(k, in_3d=in_3d)}
    lengths, prompt_length = _hyp_lengths(shapes)
    return Network(
        **asdict(encoder),
        **asdict(depth),
        family=_family(kind, encoder, adapters),
        rel_pos=_rel_pos(tensors),
        adapters=adapters,
        parameters=sum(used.values()),
        adapter_parameters=sum(n for key, n in used.items() if "_Adapter." in key)
        + sum(one.parameters for one in checkpoint.lora),
        two_way=two_way,
        mask_tokens=mask_tokens,
        classes=_classes(mask_tokens, outputs, overrides, guesses),
        outputs=outputs,
        hyp_lengths=lengths,
        hyp_prompt_length=prompt_length,
    )


def _kind(shapes: Shapes) -> Kind:
    """Which keys the network has; CheckpointError for EfficientSAM's own, which differ."""
    if shapes.count("image_encoder.layers"):
        return "tiny_vit"
    if not any(key.startswith(EFFICIENT_SAM_PROMPTS) for key in shapes):
        return "vit"
    if "image_encoder.blocks.0.mlp.fc1.weight" in shapes:
        raise CheckpointError(
            "these are EfficientSAM's own weights (blocks with mlp.fc1): supported is "
            "efficient_sam as the public Med-SA code trains it (blocks with mlp.lin1)"
        )
    return "efficient_sam"


def _family(kind: Kind, encoder: EncoderFacts, adapters: tuple[str, ...]) -> Family:
    """What the network is called."""
    if kind == "efficient_sam":
        return kind
    if kind == "tiny_vit":
        return "litemedsam" if encoder.patch_size == encoders.LITE_PATCH else "mobile_sam"
    return "medsa" if adapters else "sam"


def _unused(key: str, *, in_3d: bool) -> bool:
    """Whether the network does not run a key that its checkpoint may carry."""
    return bool(UNUSED.search(key)) or (not in_3d and bool(DEPTH.match(key)))


def _adapters(shapes: Shapes, *, in_3d: bool) -> tuple[str, ...]:
    """Kinds of adapter that run."""
    marks = {
        "space": r"image_encoder\..*\.Space_Adapter\.",
        "mlp": r"image_encoder\..*\.MLP_Adapter\.",
        "hyp": r"mask_decoder\..*\.HyP_Adapter\.",
        "decoder-mlp": r"mask_decoder\..*\.MLP_Adapter\.",
        "decoder-image": r"mask_decoder\..*\.Image_Adapter\.",
    }
    if in_3d:
        marks["depth"] = DEPTH.pattern
    return tuple(kind for kind, mark in marks.items() if any(re.match(mark, key) for key in shapes))


def _two_way(shapes: Shapes, kind: Kind) -> TwoWay:
    """Form of the two-way blocks, by the names of their MLP's keys; EfficientSAM's has no other."""
    public = any(
        ".mlp.layers.0.0." in k for k in shapes if k.startswith("mask_decoder.transformer")
    )
    return "public" if public or kind == "efficient_sam" else "meta"


def _rel_pos(tensors: Mapping[str, Tensor]) -> RelPos:
    """Whether any relative-position table holds a bias. Zeros are exact, never repaired."""
    tables = [v for k, v in tensors.items() if re.search(r"\.attn\.rel_pos_[hw]$", k)]
    if not tables:
        return "none"
    return "real" if any(bool(torch.count_nonzero(table)) for table in tables) else "zero"


def _hyp_lengths(shapes: Shapes) -> tuple[tuple[int, ...], int]:
    """HyP-Adpt's widths L_0…L_K and prompt width, of the first two-way block that has it."""
    for i in range(shapes.count("mask_decoder.transformer.layers")):
        prefix = f"mask_decoder.transformer.layers.{i}.HyP_Adapter"
        if (first := shapes.get(f"{prefix}.D_fc1.weight")) is not None:
            steps = range(shapes.count(f"{prefix}.norms"))
            later = tuple(shapes[f"{prefix}.norms.{k}.weight"][0] for k in steps)
            return first[:1] + later, shapes[f"{prefix}.P_fc.weight"][0]
    return (), 0


def _classes(mask_tokens: int, outputs: Outputs, overrides: Overrides, guesses: list[Guess]) -> int:
    """N: not stored, but a decoder has max(4, N) mask tokens."""
    if outputs == "sam":
        if overrides.classes not in (None, 1):
            raise UsageError(
                f"--classes {overrides.classes} is for networks of the public Med-SA code; this "
                "one has SAM's outputs: leave the option out"
            )
        return 1
    most = f"a decoder with {mask_tokens} mask tokens"
    if mask_tokens > 4:
        if overrides.classes not in (None, mask_tokens):
            raise UsageError(f"--classes {overrides.classes}: {most} has {mask_tokens} classes")
        return mask_tokens
    if overrides.classes is None:
        because = f"{most} may have 1 to {mask_tokens} classes"
        guesses.append(Guess(fact="classes", value="1", because=because, option="--classes"))
        return 1
    if not 1 <= overrides.classes <= mask_tokens:
        raise UsageError(f"--classes {overrides.classes}: {most} has 1 to {mask_tokens} classes")
    return overrides.classes


def _check_keys(tensors: Mapping[str, Tensor], network: Network, shapes: Shapes) -> None:
    """CheckpointError listing keys that are unknown, missing, or of the wrong shape or type."""
    try:
        with torch.device("meta"):
            wanted = ReferenceNetwork(network, shapes).state_dict()
    except Exception as e:  # what SAM's modules assert and divide by is theirs to say
        raise CheckpointError(
            f"no network can be built from the checkpoint's shapes: {type(e).__name__} {e}"
        ) from e
    in_3d = network.sd_trans is not None
    there = [key for key in wanted if key in tensors]
    wrong = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in there
        if tensors[k].shape != wanted[k].shape
    ] + [
        f"{k} holds {str(tensors[k].dtype).removeprefix('torch.')}, expected floating-point numbers"
        for k in there
        if wanted[k].is_floating_point() and not tensors[k].is_floating_point()
    ]
    problems = sizes.misfit(
        shapes,
        missing=[k for k in wanted if k not in tensors and not _unused(k, in_3d=in_3d)],
        unknown=[k for k in tensors if k not in wanted and not _unused(k, in_3d=in_3d)],
        wrong=wrong,
    )
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the network its shapes suggest ({network.family}, "
            f"{sum(network.depths)} blocks of width {network.widths[-1]}). {problems}"
        )
