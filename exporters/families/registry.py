"""The table of network families: a checkpoint's keys, or a network's name → its row."""

from __future__ import annotations

from collections.abc import Collection

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.errors import BundleError
from medsa_deploy.exporters.decoders import DecoderKind
from medsa_deploy.exporters.shapes import Shapes

from . import efficient_sam, sam_vit, tiny_vit
from .family import Family

SAM_VIT = Family(
    titles={"medsa": "Med-SA", "sam": "SAM"},
    encoder_title="ViT",
    noun="a SAM ViT",
    stems=sam_vit.keys.STEMS,
    recognises=sam_vit.keys.recognises,
    required_keys=sam_vit.keys.REQUIRED,
    optional_keys=sam_vit.keys.OPTIONAL,
    unused_keys_in_2d=sam_vit.keys.UNUSED_IN_2D,
    facts=sam_vit.facts.facts_of,
    reference_encoder=sam_vit.reference.ImageEncoder.of,
    fold_encoder=sam_vit.folded.fold_encoder,
    sized_by_tables=True,
    classes_if_public=True,
    takes_slices=True,
)
"""Keys that no family recognises are compared with this one's."""

FAMILIES: tuple[Family, ...] = (
    Family(
        titles={"litemedsam": "LiteMedSAM", "mobile_sam": "mobile_sam"},
        encoder_title="TinyViT",
        noun="a TinyViT",
        stems=tiny_vit.keys.STEMS,
        recognises=tiny_vit.keys.recognises,
        required_keys=tiny_vit.keys.REQUIRED,
        optional_keys=tiny_vit.keys.OPTIONAL,
        unused_keys=tiny_vit.keys.UNUSED,
        facts=tiny_vit.facts.facts_of,
        reference_encoder=tiny_vit.reference.ImageEncoder.of,
        fold_encoder=tiny_vit.folded.fold_encoder,
        conventions=tiny_vit.conventions.CONVENTIONS,
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
        decoder=DecoderKind(
            required_keys=efficient_sam.keys.DECODER,
            two_way=efficient_sam.keys.two_way,
            takes_masks=False,
            reference=efficient_sam.reference.prompts_and_decoder,
            layers=efficient_sam.folded.decoder_layers,
        ),
        conventions=efficient_sam.conventions.CONVENTIONS,
        sized_by_tables=True,
    ),
    SAM_VIT,
)
"""The first family that recognises a checkpoint's keys is its own."""


def family_of(shapes: Shapes) -> Family:
    """The family of a checkpoint."""
    return next((family for family in FAMILIES if family.recognises(shapes)), SAM_VIT)


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
