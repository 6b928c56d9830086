"""A made-up network family is one row: from its checkpoint to masks, with nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from command_line import call, copied, edit_manifest
from golden_cases import relative_l2
from invented import vit_keys, weights
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import FamilyFacts, Network, load_manifest
from medsa_deploy.errors import BundleError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.decoders import STEMS
from medsa_deploy.exporters.families import registry
from medsa_deploy.exporters.families.family import Family
from medsa_deploy.exporters.folded.linear import merged_norm
from medsa_deploy.exporters.guesses import Guess, Overrides, image_size_guess, whole_patches
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceBackend
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.runtime import Session, load

WIDTH, PATCH, SIZE = 24, 16, 64


class Trunk(nn.Module):
    """Patches, a batch norm, residual 3×3 convolutions, a 1×1 convolution."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        width, _, patch, _ = shapes["trunk.patches.weight"]
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.steady = nn.BatchNorm2d(width)
        self.ripples = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(shapes.count("trunk.ripples"))
        )
        self.out = nn.Conv2d(width, 256, 1)

    @classmethod
    def of(cls, network: Network, shapes: Shapes) -> Self:
        return cls(shapes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.steady(self.patches(image))
        for ripple in self.ripples:
            x = x + F.gelu(ripple(x))
        return self.out(x)


class FoldedTrunk(nn.Module):
    """The batch norm is part of the convolution before it."""

    def __init__(self, trunk: Trunk, network: Network) -> None:
        super().__init__()
        self.patches = merged_norm(trunk.patches, trunk.steady)
        self.ripples, self.out = trunk.ripples, trunk.out

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        for ripple in self.ripples:
            x = x + F.gelu(ripple(x))
        return self.out(x)


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    width, _, patch, _ = shapes["trunk.patches.weight"]
    size = overrides.image_size
    if size is None:
        size = SIZE
        guesses.append(image_size_guess(size, "no key shows it; Pond's size"))
    return FamilyFacts(
        family="pond",
        encoder="ripples",
        widths=(width,),
        depths=(shapes.count("trunk.ripples"),),
        heads=(0,),
        windows=(0,),
        global_blocks=(),
        image_size=whole_patches(size, patch),
        embedding_size=size // patch,
        patch_size=patch,
    )


POND = Family(
    titles={"pond": "Pond"},
    encoder_title="ripples",
    noun="a Pond",
    stems=("trunk.patches.", *STEMS),
    recognises=lambda shapes: "trunk.patches.weight" in shapes,
    required_keys={
        "trunk.patches.weight": "C 3 p p",
        "trunk.steady.weight": "C",
        "trunk.ripples.#.weight": "C C 3 3",
        "trunk.out.weight": "256 C 1 1",
    },
    facts=facts_of,
    encoder_key="trunk",
    reference_encoder=Trunk.of,
    fold_encoder=FoldedTrunk,
)


def pond_tensors() -> dict[str, Tensor]:
    decoder = {k: v for k, v in vit_keys().items() if not k.startswith("image_encoder.")}
    torch.manual_seed(7)
    shapes = {"trunk.patches.weight": (WIDTH, 3, PATCH, PATCH)}
    trunk = Trunk(Shapes(shapes | {f"trunk.ripples.{i}.weight": () for i in range(3)}))
    nn.init.uniform_(trunk.steady.weight, 0.5, 1.5)
    nn.init.uniform_(trunk.steady.bias, -0.5, 0.5)
    trunk.steady.running_mean.uniform_(-0.2, 0.2)
    trunk.steady.running_var.uniform_(0.5, 2)
    return weights(decoder) | {f"trunk.{k}": v for k, v in trunk.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def _row() -> Iterator[None]:
    """The only thing that is changed: the table has one more row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", (*registry.FAMILIES, POND))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pond") / "pond.pth"
    torch.save(pond_tensors(), path)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    done = call("export", checkpoint, "--json")
    assert done.code == 0, done.err
    return checkpoint.with_suffix(".medsa")


def test_its_facts_are_a_table(checkpoint: Path) -> None:
    done = call("inspect", checkpoint)
    assert done.code == 0, done.err
    facts = " ".join(done.out.split())
    for fact in (
        "network Pond, ripples",
        "encoder width 24, 3 blocks, 0 heads",
        "image 64×64 → embedding 4×4",
        "adapters none",
        "image size 64 no key shows it; Pond's size --image-size",
        "preprocess sam",
    ):
        assert fact in facts
    assert "relative positions" not in facts


def test_its_facts_are_in_the_manifest(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert (manifest.network.family, manifest.network.encoder) == ("pond", "ripples")
    assert manifest.network.parameters == sum(
        tensor.numel() for key, tensor in pond_tensors().items() if "num_batches" not in key
    )
    assert manifest.mask_prompt_size == 16


def test_it_verifies(bundle: Path, checkpoint: Path) -> None:
    done = call("verify", bundle, "--checkpoint", checkpoint, "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert (parity["seeded_images"], parity["prompt_sets"]) == (2, 10)
    for tensor in parity["tensors"].values():
        assert tensor["relative_l2"] <= 2e-5


@pytest.mark.parametrize("prompts", [{"points": [[30, 20]]}, {"box": [10, 12, 50, 40]}, "mask"])
def test_its_masks_are_the_references(bundle: Path, checkpoint: Path, prompts: object) -> None:
    manifest = load_manifest(bundle)
    reference = build_reference(manifest.network, load_checkpoint(checkpoint).tensors)
    image = seeded_image(90, 5)[:70]
    if prompts == "mask":
        prompts = {"points": [[30, 20]], "mask": np.random.default_rng(3).normal(size=(16, 16))}
    with load(bundle) as session, Session(manifest, ReferenceBackend(reference)) as expected:
        predictions = [
            each.segment(each.encode(image), multimask=True, **prompts)
            for each in (session, expected)
        ]
    masks, expected_masks = (prediction.masks for prediction in predictions)
    assert (masks == expected_masks).all()
    assert 0 < masks.mean() < 1


@torch.inference_mode()
def test_its_folded_encoder_is_the_reference(checkpoint: Path, bundle: Path) -> None:
    network = load_manifest(bundle).network
    reference = build_reference(network, load_checkpoint(checkpoint).tensors)
    image = torch.from_numpy(seeded_image(64, 2)).permute(2, 0, 1)[None].float() / 255
    assert relative_l2(fold(reference).encoder(image).numpy(), reference.encode(image).numpy()) < (
        3e-6
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("trunk.ripples.1.bias", ["(pond, 3 blocks of width 24)", "keys: trunk.ripples.1.bias"]),
        ("trunk.steady.weight", ["missing keys: trunk.steady.weight"]),
        ("prompt_encoder.", ["is not a SAM checkpoint: nothing under prompt_encoder.;"]),
    ],
)
def test_keys_that_it_lacks_are_named(tmp_path: Path, key: str, words: list[str]) -> None:
    tensors = {k: v for k, v in pond_tensors().items() if not k.startswith(key)}
    torch.save(tensors, tmp_path / "x.pth")
    done = call("inspect", tmp_path / "x.pth")
    assert done.code == 2
    for word in words:
        assert word in done.error


def test_a_prefix_before_its_keys_is_left_out(tmp_path: Path) -> None:
    torch.save({f"net.{k}": v for k, v in pond_tensors().items()}, tmp_path / "x.pth")
    assert call("inspect", tmp_path / "x.pth", "--json").json["network"]["family"] == "pond"


def test_options_that_are_not_for_it(checkpoint: Path) -> None:
    assert "with adapters; this is a Pond" in call("inspect", checkpoint, "--depth-chunk=4").error
    assert (
        "is for efficient_sam, efficientsam: leave"
        in call("inspect", checkpoint, "--pad-points=6").error
    )


def test_a_family_that_no_row_describes(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Its bundle runs, since the runtime asks for no row; only its own network cannot be built."""
    unknown = copied(bundle, tmp_path)
    edit_manifest(unknown, network__family="lake")
    with load(unknown) as session:
        assert session.segment(session.encode(seeded_image(64, 1)), points=[[9, 9]]).masks.any()
    words = "family 'lake'; this medsa-deploy knows litemedsam, mobile_sam, efficient_sam, eff"
    with pytest.raises(BundleError, match=words):
        build_reference(load_manifest(unknown).network, load_checkpoint(checkpoint).tensors)


def test_a_networks_name_is_in_one_row() -> None:
    names = [name for family in registry.FAMILIES for name in family.titles]
    assert len(names) == len(set(names))
