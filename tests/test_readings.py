"""A checkpoint that several codes may have trained: labelled images decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from golden_cases import GoldenCase
from PIL import Image
from test_unprompted import automatic

from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import contract
from medsa_deploy.exporters.networks import build_reference
from medsa_deploy.exporters.reference import ReferenceBackend
from medsa_deploy.runtime import Session
from medsa_deploy.stages.readings import try_readings


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters in the encoder alone over Meta's decoder: of Med-SA or of finetune-SAM."""
    folder = tmp_path_factory.mktemp("readings")
    tensors = GoldenCase("finetune_sam_adapter").state_dict.items()
    facts = {
        key: torch.from_numpy(value)
        for key, value in tensors
        if not (key.startswith("mask_decoder.transformer.") and "Adapter." in key)
    }
    torch.save(facts, folder / "ckpt.pth")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(2):
        Image.fromarray(seeded_image(128, i)[:100]).save(folder / f"images/{i}.png")
    return folder


def write_labels(folder: Path, code: str) -> None:
    """Label maps as the checkpoint's own network gives them when `code` has trained it."""
    checkpoint = load_checkpoint(folder / "ckpt.pth")
    architecture = infer(checkpoint, Overrides(trained_with=code))
    with automatic() as pattern:
        manifest = pattern.manifest
    from dataclasses import replace

    manifest = replace(
        manifest,
        network=architecture.network,
        conventions=architecture.conventions,
        graphs=contract(architecture.network),
    )
    backend = ReferenceBackend(build_reference(architecture.network, checkpoint.tensors))
    with Session(manifest, backend) as session:
        for i in range(2):
            pixels = np.asarray(Image.open(folder / f"images/{i}.png"))
            labels = session.segment(session.encode(pixels)).labels
            assert labels.any()
            Image.fromarray(labels).save(folder / f"labels/{i}.png")


def test_the_reading_that_fits_the_labels_is_found_and_exported(ambiguous: Path) -> None:
    write_labels(ambiguous, "finetune-sam")
    done = call("inspect", ambiguous / "ckpt.pth", "--json")
    (guess,) = (g for g in done.json["guesses"] if g["fact"] == "trained with")
    assert guess["value"] == "med-sa"
    assert "finetune-sam" in guess["because"]
    output = ambiguous / "found.medsa"
    options = ("--images", ambiguous / "images", "--masks", ambiguous / "labels", "-o", output)
    done = call("export", ambiguous / "ckpt.pth", *options)
    assert done.code == 0, done.err
    assert "the first was taken" in done.out
    conventions = load_manifest(output).conventions
    assert (conventions.preprocess, conventions.prompts) == ("finetune-sam", "none")


def test_readings_are_ordered_by_dice(ambiguous: Path) -> None:
    write_labels(ambiguous, "finetune-sam")
    checkpoint = load_checkpoint(ambiguous / "ckpt.pth")
    folders = {"images": ambiguous / "images", "labels": ambiguous / "labels"}
    best, other = try_readings(checkpoint, Overrides(), **folders)
    assert (best.trained_with, best.prompt, best.dice) == ("finetune-sam", "none", 1.0)
    assert (other.trained_with, other.prompt, other.images) == ("med-sa", "box", 2)
    assert other.dice is not None
    assert other.dice < 0.9
    with pytest.raises(UsageError, match="finds the code that --trained-with names"):
        try_readings(checkpoint, Overrides(trained_with="med-sa"), **folders)


def test_labels_that_cannot_be_used(ambiguous: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(ambiguous / "ckpt.pth")
    (tmp_path / "empty").mkdir()
    for i in range(2):
        Image.fromarray(np.zeros((100, 128), np.uint8)).save(tmp_path / f"empty/{i}.png")
    with pytest.raises(ImageError, match="no reading of the checkpoint could be measured"):
        try_readings(
            checkpoint, Overrides(), images=ambiguous / "images", labels=tmp_path / "empty"
        )
    done = call("export", ambiguous / "ckpt.pth", "--masks", tmp_path, "-o", tmp_path / "b.medsa")
    assert (done.code, "--masks holds the labels of --images" in done.err) == (2, True)
