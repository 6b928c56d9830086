"""A checkpoint's keys and shapes → the network's facts and conventions, with every guess named.

Nothing is inferred from a file's name. Each fact that the shapes do not determine is a `Guess`: it
is printed, with the option that sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medsa_deploy.bundle.manifest import Conventions, FamilyFacts, Network, Outputs, RelPos
from medsa_deploy.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint
from .conventions import conventions_of
from .depth import depth_of
from .families.family import Family
from .families.registry import family_of, possible_codes
from .guesses import Guess, Overrides
from .key_check import misfit
from .sd_trans import SDTrans
from .shapes import Shapes
from .training import ORIGINS, TrainingCode

__all__ = ["Architecture", "Guess", "Overrides", "infer"]

ADAPTERS = {
    "space": r"image_encoder\..*\.Space_Adapter\.",
    "mlp": r"image_encoder\..*\.MLP_Adapter\.",
    "hyp": r"mask_decoder\..*\.HyP_Adapter\.",
    "decoder-mlp": r"mask_decoder\..*\.MLP_Adapter\.",
    "decoder-image": r"mask_decoder\..*\.Image_Adapter\.",
    "decoder": r"mask_decoder\.transformer\.layers\.\d+\.Adapter\.",
}
"""Kinds of adapter, and their keys."""
DEPTH_ADAPTERS = {"depth": r"image_encoder\.blocks\.\d+\.Depth_Adapter\."}
"""The kind that runs in 3D only."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A checkpoint's network and conventions, with the guesses among them."""

    network: Network
    conventions: Conventions
    guesses: tuple[Guess, ...]


def infer(checkpoint: Checkpoint, overrides: Overrides) -> Architecture:
    """The network's facts and conventions; CheckpointError lists keys that do not fit them."""
    shapes, evidence = checkpoint.shapes, checkpoint.evidence
    family = family_of(evidence, overrides.trained_with)
    guesses: list[Guess] = []
    if overrides.image_size is None and (reason := family.hidden_size(evidence)):
        raise UsageError(reason)
    checked = family.checked(shapes)
    adapted = bool(checkpoint.lora or _adapters(shapes, family, in_3d=False))
    code = _trained_with(checkpoint, family, overrides, guesses)
    facts = family.facts(checked, overrides, guesses, adapted=adapted)
    depth = depth_of(shapes, family, overrides, guesses)
    network = _network(checkpoint, family, facts, depth, overrides, guesses)
    _check_keys(checkpoint.tensors, family, network, checked)
    conventions = conventions_of(network, family, code, overrides, guesses)
    return Architecture(network=network, conventions=conventions, guesses=tuple(guesses))


def _trained_with(
    checkpoint: Checkpoint, family: Family, overrides: Overrides, guesses: list[Guess]
) -> TrainingCode:
    """The code that trained the network; a guess if its keys may be another's."""
    if overrides.trained_with is not None:
        return overrides.trained_with
    codes = family.codes(checkpoint.evidence)
    if checkpoint.public_training and "med-sa" in codes:
        return "med-sa"
    code, *alternatives = codes
    alternatives += [each for each in possible_codes(checkpoint.evidence) if each not in codes]
    if alternatives:
        because = f"{ORIGINS[code].because}; files of {', '.join(alternatives)} may look the same"
        guesses.append(
            Guess(fact="trained with", value=code, because=because, option="--trained-with")
        )
    return code


def _network(
    checkpoint: Checkpoint,
    family: Family,
    facts: FamilyFacts,
    depth: SDTrans | None,
    overrides: Overrides,
    guesses: list[Guess],
) -> Network:
    """All facts about the network."""
    tensors, shapes = checkpoint.tensors, checkpoint.shapes
    in_3d = depth is not None
    adapters = _adapters(shapes, family, in_3d=in_3d)
    adapters += tuple(sorted({update.kind.split()[0] for update in checkpoint.lora}))
    two_way = family.decoder.two_way(shapes)
    public = bool(adapters) or two_way == "public" or overrides.trained_with == "med-sa"
    outputs: Outputs = "classes" if family.classes_if_public and public else "sam"
    if family.first_label is not None:
        outputs = "labels"
    mask_tokens = shapes["mask_decoder.mask_tokens.weight"][0]
    used = {k: v.numel() for k, v in tensors.items() if family.uses(k, in_3d=in_3d)}
    lengths, prompt_length = _hyp_lengths(shapes)
    return Network(
        **vars(facts),
        rel_pos=_rel_pos(tensors),
        adapters=adapters,
        parameters=sum(used.values()),
        adapter_parameters=sum(n for key, n in used.items() if "Adapter." in key)
        + sum(update.parameters for update in checkpoint.lora),
        two_way=two_way,
        mask_tokens=mask_tokens,
        classes=_classes(mask_tokens, outputs, family.first_label, overrides, guesses),
        outputs=outputs,
        hyp_lengths=lengths,
        hyp_prompt_length=prompt_length,
        sd_trans=depth.grouping if depth else None,
        depth_chunk=depth.chunk if depth else None,
        slices=depth.slices if depth else None,
    )


def _adapters(shapes: Shapes, family: Family, *, in_3d: bool) -> tuple[str, ...]:
    """Kinds of adapter that run."""
    kinds = {**ADAPTERS, **(DEPTH_ADAPTERS if in_3d else {}), **family.adapters}
    return tuple(kind for kind, keys in kinds.items() if any(re.match(keys, k) for k in shapes))


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


def _classes(
    mask_tokens: int,
    outputs: Outputs,
    first_label: int | None,
    overrides: Overrides,
    guesses: list[Guess],
) -> int:
    """N: not stored, but a decoder has max(4, N) mask tokens, or one for each label."""
    if first_label is not None:
        return _label_classes(mask_tokens, first_label, overrides)
    if outputs == "sam":
        if overrides.classes not in (None, 1):
            raise UsageError(
                f"--classes {overrides.classes} is for networks of the public Med-SA code; this "
                "one has SAM's outputs: leave the option out"
            )
        return 1
    decoder = f"a decoder with {mask_tokens} mask tokens"
    if mask_tokens > 4:
        if overrides.classes not in (None, mask_tokens):
            raise UsageError(f"--classes {overrides.classes}: {decoder} has {mask_tokens} classes")
        return mask_tokens
    if overrides.classes is None:
        because = f"{decoder} may have 1 to {mask_tokens} classes"
        guesses.append(Guess(fact="classes", value="1", because=because, option="--classes"))
        return 1
    if not 1 <= overrides.classes <= mask_tokens:
        raise UsageError(f"--classes {overrides.classes}: {decoder} has 1 to {mask_tokens} classes")
    return overrides.classes


def _label_classes(mask_tokens: int, first_label: int, overrides: Overrides) -> int:
    """Classes beside the background; `--classes` may count it, as finetune-SAM's code does."""
    labels = mask_tokens - first_label
    if labels < 2:
        raise CheckpointError(
            f"a decoder with {mask_tokens} mask tokens has no class beside the background: "
            f"expected at least {first_label + 2}"
        )
    if overrides.classes not in (None, labels, labels - 1):
        raise UsageError(
            f"--classes {overrides.classes}: a decoder with {mask_tokens} mask tokens has "
            f"{labels - 1} classes and the background: leave the option out"
        )
    return labels - 1


def _check_keys(
    tensors: Mapping[str, Tensor], family: Family, network: Network, shapes: Shapes
) -> None:
    """CheckpointError listing keys that are unknown, missing, or of the wrong shape or type."""
    try:
        with torch.device("meta"):
            expected = family.reference(network, shapes).state_dict()
    except Exception as e:  # SAM's modules assert and divide without words of their own
        raise CheckpointError(
            f"no network can be built from the checkpoint's shapes: {type(e).__name__} {e}"
        ) from e
    in_3d = network.sd_trans is not None
    common = [key for key in expected if key in tensors]
    wrong = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in common
        if tensors[k].shape != expected[k].shape
    ] + [
        f"{k} holds {str(tensors[k].dtype).removeprefix('torch.')}, expected floating-point numbers"
        for k in common
        if expected[k].is_floating_point() and not tensors[k].is_floating_point()
    ]
    problems = misfit(
        shapes,
        missing=[k for k in expected if k not in tensors and family.uses(k, in_3d=in_3d)],
        unknown=[k for k in tensors if k not in expected and family.uses(k, in_3d=in_3d)],
        wrong=wrong,
    )
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the network its shapes suggest ({network.family}, "
            f"{sum(network.depths)} blocks of width {network.widths[-1]}). {problems}"
        )
