"""The demonstration that needs no click: its training, its checkpoint, its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call

from benchmarks.demo_checkpoint import automatic, chunks, examples
from benchmarks.demo_checkpoint.recipe import CHECKPOINT
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.images import read_labels
from medsa_deploy.stages.demo.automatic import CLASSES, HELD_OUT, IMAGE_SIZE
from medsa_deploy.stages.demo.mni_template import structures


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(CHECKPOINT).tensors)


def test_slices_have_their_tissues() -> None:
    slices = examples.Tissues()
    image, labels = slices.example(np.random.default_rng(1), 3, shrunk=2)
    assert image.shape == (3, 3, 128, 128)
    assert labels.shape == (3, 256, 256)
    counts = torch.bincount(labels.flatten(), minlength=4)
    assert (counts > 0).all()
    assert counts[0] > counts[3]
    template, z = chunks.Template(), HELD_OUT[0]
    truth = structures([z])
    for label, name in enumerate(CLASSES, 1):
        np.testing.assert_array_equal(template.labels(z) == label, truth[name][0])


def test_fresh_updates_change_nothing_and_are_the_only_ones_trained(base) -> None:
    tensors = automatic.fresh_tensors(base, 3)
    network = automatic.AutomaticNetwork(tensors).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        np.testing.assert_allclose(network(image), network.sam(image), atol=1e-5)
    trained = {name for name, _ in network.named_parameters() if automatic.is_trained(name)}
    assert {name for name in trained if name.startswith("updates.")} == {
        f"updates.{update.name.format(side)}" for update in automatic.updates() for side in "ab"
    }
    frozen = {name for name, _ in network.named_parameters()} - trained
    assert all("transformer" in key or "encoder" in key for key in frozen)


def test_training_learns_resumes_and_writes_a_samed_file(base, tmp_path: Path) -> None:
    part = automatic.Part(steps=20, rate=3e-3, shrunk=4, batch=2)
    recipe = automatic.AutomaticRecipe(seed=1, parts={"tiny": part}, save_every=10)
    half = automatic.AutomaticRecipe(
        seed=1, parts={"tiny": automatic.Part(**{**vars(part), "steps": 10})}, save_every=10
    )
    automatic.train_automatic(half, base, tmp_path)
    state = torch.load(tmp_path / "tiny.pt", weights_only=True)
    assert state["done"] == 10
    tensors, figures = automatic.train_automatic(recipe, base, tmp_path)
    assert figures["tiny"]["steps"] == 20
    losses = torch.load(tmp_path / "tiny.pt", weights_only=True)["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    automatic.save_samed(tensors, tmp_path / "samed.pth")
    loaded = load_checkpoint(tmp_path / "samed.pth", base=CHECKPOINT)
    network = infer(loaded, Overrides(image_size=IMAGE_SIZE)).network
    assert (network.family, network.outputs, network.classes) == ("samed", "labels", 3)


def test_a_state_of_another_rate_is_refused(base, tmp_path: Path) -> None:
    def recipe(rate: float) -> automatic.AutomaticRecipe:
        part = automatic.Part(steps=1, rate=rate, shrunk=4, batch=1)
        return automatic.AutomaticRecipe(seed=1, parts={"tiny": part})

    automatic.train_automatic(recipe(1e-3), base, tmp_path)
    with pytest.raises(SystemExit, match="not tiny 100, seed 1"):
        automatic.train_automatic(recipe(2e-3), base, tmp_path)


def test_the_checkpoint_is_small_and_shows_what_it_is() -> None:
    assert automatic.AUTOMATIC_CHECKPOINT.stat().st_size < 5e6
    checkpoint = load_checkpoint(automatic.AUTOMATIC_CHECKPOINT, base=CHECKPOINT)
    architecture = infer(checkpoint, Overrides(image_size=IMAGE_SIZE, class_names=CLASSES))
    network, conventions = architecture.network, architecture.conventions
    assert (network.family, network.image_size, network.classes) == ("samed", 256, 3)
    assert (network.windows, network.global_blocks) == ((8,), (3, 7))
    assert (conventions.preprocess, conventions.prompts) == ("samed", "none")


def test_the_checkpoint_segments_a_held_out_block_as_published() -> None:
    """Through the reference network that `export` proves its graphs against."""
    from medsa_deploy.exporters.networks import build_reference
    from medsa_deploy.exporters.reference import ReferenceBackend

    checkpoint = load_checkpoint(automatic.AUTOMATIC_CHECKPOINT, base=CHECKPOINT)
    network = infer(checkpoint, Overrides(image_size=IMAGE_SIZE)).network
    backend = ReferenceBackend(build_reference(network, checkpoint.tensors))
    block, template = chunks.TEST_BLOCKS[1], chunks.Template()
    from medsa_deploy import transforms

    segments, no_points = [], np.zeros((1, 0), np.float32)
    for z in block:
        image, frame = transforms.preprocess(template.plane(z), "samed", IMAGE_SIZE)
        embedding = backend.encode(image[None])
        logits, _ = backend.decode(embedding, no_points[..., None].repeat(2, -1), no_points, None)
        segments.append(
            transforms.exclusive_labels(transforms.pixel_values(logits[0], frame, "samed"))
        )
    published = json.loads(automatic.AUTOMATIC_RESULT.read_text())["dice"]["test"]
    truth, labels = structures(list(block)), np.stack(segments)
    for label, name in enumerate(CLASSES, 1):
        dice = automatic.dice(labels == label, truth[name])
        assert dice == pytest.approx(published[f"{block.start}…{block.stop - 1}"][name], abs=0.005)


@pytest.mark.slow
def test_the_demonstration(tmp_path: Path) -> None:
    done = call("demo", "--model", "automatic", "-o", tmp_path / "demo", "--json")
    assert done.code == 0, done.err
    published = json.loads(automatic.AUTOMATIC_RESULT.read_text())["dice"]["test"]["all"]
    assert done.json["dice"] == pytest.approx(published, abs=0.005)
    assert done.json["verified"]
    labels = read_labels(Path(done.json["segmentation"]))
    assert labels.present() == [1, 2, 3]
    assert Path(done.json["montage"]).stat().st_size > 10_000
