"""The table of network families: a checkpoint's keys, or a network's name → its row."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.errors import BundleError, UsageError
from medsa_deploy.exporters.decoders import DecoderKind
from medsa_deploy.exporters.layouts import MEDSA, FileLayout, Tensors
from medsa_deploy.exporters.lora import LoRA
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.exporters.training import TrainingCode

from . import efficient_sam, efficientsam, finetune_sam, sam_med2d, sam_vit, samed, tiny_vit
from .family import Family, low_rank_hides_size

SAM_VIT = Family(
    titles={"medsa": "Med-SA", "sam": "SAM"},
    encoder_title="ViT",
    noun="a SAM ViT",
    stems=sam_vit.keys.STEMS,
    recognises=sam_vit.keys.recognises,
    codes=sam_vit.keys.codes,
    admits=sam_vit.keys.admits,
    required_keys=sam_vit.keys.REQUIRED,
    optional_keys=sam_vit.keys.OPTIONAL,
    unused_keys_in_2d=sam_vit.keys.UNUSED_IN_2D,
    facts=sam_vit.facts.facts_of,
    reference_encoder=sam_vit.reference.ImageEncoder.of,
    fold_encoder=sam_vit.folded.fold_encoder,
    hidden_size=low_rank_hides_size,
    classes_if_public=True,
    takes_slices=True,
)
"""Keys that no family recognises are compared with this one's."""

OWN_DECODER = DecoderKind(
    required_keys=efficient_sam.keys.DECODER,
    two_way=efficient_sam.keys.two_way,
    takes_masks=False,
    reference=efficient_sam.reference.prompts_and_decoder,
    layers=efficient_sam.folded.decoder_layers,
)
"""EfficientSAM's."""

FAMILIES: tuple[Family, ...] = (
    Family(
        titles={"litemedsam": "LiteMedSAM", "mobile_sam": "mobile_sam"},
        encoder_title="TinyViT",
        noun="a TinyViT",
        stems=tiny_vit.keys.STEMS,
        recognises=tiny_vit.keys.recognises,
        codes=tiny_vit.keys.codes,
        required_keys=tiny_vit.keys.REQUIRED,
        optional_keys=tiny_vit.keys.OPTIONAL,
        unused_keys=tiny_vit.keys.UNUSED,
        facts=tiny_vit.facts.facts_of,
        reference_encoder=tiny_vit.reference.ImageEncoder.of,
        fold_encoder=tiny_vit.folded.fold_encoder,
    ),
    Family(
        titles={"efficient_sam": "efficient_sam"},
        encoder_title="ViT",
        noun="efficient_sam",
        stems=efficient_sam.keys.STEMS,
        recognises=efficient_sam.keys.recognises,
        required_keys=efficient_sam.keys.REQUIRED,
        optional_keys=efficient_sam.keys.OPTIONAL,
        unused_keys_in_2d=efficient_sam.keys.UNUSED_IN_2D,
        facts=efficient_sam.facts.facts_of,
        reference_encoder=efficient_sam.reference.ImageEncoder.of,
        fold_encoder=sam_vit.folded.fold_encoder,
        decoder=OWN_DECODER,
        conventions=efficient_sam.conventions.CONVENTIONS,
        hidden_size=low_rank_hides_size,
    ),
    Family(
        titles={"efficientsam": "EfficientSAM"},
        encoder_title="ViT",
        noun="EfficientSAM's own network",
        stems=efficientsam.keys.STEMS,
        recognises=efficientsam.keys.recognises,
        codes=lambda shapes: ("efficientsam",),
        layout=efficientsam.keys.LAYOUT,
        required_keys=efficientsam.keys.REQUIRED,
        facts=efficientsam.facts.facts_of,
        reference_encoder=efficientsam.reference.ImageEncoder.of,
        fold_encoder=sam_vit.folded.fold_encoder,
        decoder=OWN_DECODER,
        conventions=efficientsam.conventions.CONVENTIONS,
    ),
    Family(
        titles={"sam_med2d": "SAM-Med2D"},
        encoder_title="ViT",
        noun="SAM-Med2D's network",
        stems=sam_vit.keys.STEMS,
        recognises=sam_med2d.keys.recognises,
        codes=lambda shapes: ("sam-med2d",),
        required_keys=sam_vit.keys.REQUIRED,
        optional_keys=sam_med2d.keys.OPTIONAL,
        adapters=sam_med2d.keys.ADAPTERS,
        facts=sam_med2d.facts.facts_of,
        reference_encoder=sam_med2d.reference.ImageEncoder.of,
        fold_encoder=sam_med2d.folded.fold_encoder,
    ),
    Family(
        titles={"samed": "SAMed"},
        encoder_title="ViT",
        noun="SAMed's network",
        stems=sam_vit.keys.STEMS,
        recognises=samed.keys.recognises,
        codes=lambda shapes: ("samed",),
        admits=samed.keys.admits,
        layout=samed.lora.LAYOUT,
        required_keys=sam_vit.keys.REQUIRED,
        optional_keys=sam_vit.keys.OPTIONAL,
        facts=samed.facts.facts_of,
        hidden_size=samed.keys.hidden_size,
        reference_encoder=samed.reference.ImageEncoder.of,
        fold_encoder=sam_vit.folded.fold_encoder,
        first_label=samed.facts.FIRST_LABEL,
    ),
    Family(
        titles={"finetune_sam": "finetune-SAM"},
        encoder_title="ViT",
        noun="finetune-SAM's network",
        stems=sam_vit.keys.STEMS,
        recognises=finetune_sam.keys.recognises,
        codes=lambda shapes: ("finetune-sam",),
        admits=finetune_sam.keys.admits,
        layout=finetune_sam.lora.LAYOUT,
        required_keys=sam_vit.keys.REQUIRED,
        optional_keys=sam_vit.keys.OPTIONAL,
        unused_keys=sam_vit.keys.UNUSED_IN_2D,
        facts=finetune_sam.facts.facts_of,
        reference_encoder=finetune_sam.reference.ImageEncoder.of,
        fold_encoder=sam_vit.folded.fold_encoder,
        first_label=finetune_sam.facts.FIRST_LABEL,
    ),
    SAM_VIT,
)
"""The first family that recognises a checkpoint's keys is its own."""


def family_of(shapes: Shapes, trained_with: TrainingCode | None = None) -> Family:
    """The family of a checkpoint; UsageError if `trained_with` does not train such networks.

    `shapes`: of the file's keys, low-rank factors included.
    """
    family = next((family for family in FAMILIES if family.recognises(shapes)), SAM_VIT)
    if trained_with is None or trained_with in family.possible_codes(shapes):
        return family
    for other in FAMILIES:
        if trained_with in other.possible_codes(shapes):
            return other
    raise UsageError(
        f"--trained-with {trained_with}: the checkpoint's keys are those of {family.noun}, which "
        f"{' or '.join(possible_codes(shapes))} trains"
    )


def possible_codes(shapes: Shapes) -> list[TrainingCode]:
    """The codes that may have trained a checkpoint, its own family's first."""
    family = family_of(shapes)
    codes = (code for row in (family, *FAMILIES) for code in row.possible_codes(shapes))
    return list(dict.fromkeys(codes))


def layout_of(keys: Iterable[str]) -> FileLayout:
    """The layout of a file that may need a base."""
    keys = list(keys)
    layouts = (family.layout for family in FAMILIES if family.layout is not MEDSA)
    return next((each for each in layouts if any(map(each.adapter_keys.search, keys))), MEDSA)


def merged(tensors: Tensors) -> tuple[dict[str, Tensor], tuple[LoRA, ...]]:
    """The tensors with the low-rank updates of every layout merged, and what was merged."""
    current = dict(tensors)
    updates: list[LoRA] = []
    for layout in dict.fromkeys([MEDSA, *(family.layout for family in FAMILIES)]):
        current, added = layout.merge(current)
        updates += added
    return current, tuple(updates)


def family_named(name: str) -> Family:
    """The family of a network that a manifest describes."""
    for family in FAMILIES:
        if name in family.titles:
            return family
    names = ", ".join(name for family in FAMILIES for name in family.titles)
    raise BundleError(
        f"the bundle's network is of the family {name!r}; this medsa-deploy knows {names}: install "
        "the medsa-deploy that wrote the bundle"
    )


def title_of(network: Network) -> str:
    """A network's name in tables: `Med-SA, ViT`."""
    family = family_named(network.family)
    return f"{family.titles[network.family]}, {family.encoder_title}"


def label_tokens(network: Network) -> str:
    """The mask tokens whose masks leave the decoder: `1…3 of 4`."""
    leaving = family_named(network.family).leaving(network)
    return f"{leaving[0]}…{leaving[-1]} of {network.mask_tokens}"


def padded_families() -> str:
    """Names of the networks whose prompt sets are padded to a number of points."""
    padded = (family for family in FAMILIES if family.conventions.pad_points is not None)
    return ", ".join(name for family in padded for name in family.titles)


def missing_stems(keys: Collection[str]) -> list[str]:
    """Stems of a whole checkpoint that keys lack, of the family of which they lack fewest."""
    lists = [
        [stem for stem in family.stems if not any(key.startswith(stem) for key in keys)]
        for family in FAMILIES
    ]
    return min(lists, key=len)
