"""The demonstration checkpoint: its phantoms, splits and prompts, its training, and the file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo_checkpoint import (
    chunks,
    examples,
    network,
    phantoms,
    prompts,
    readout,
    training,
)
from benchmarks.demo_checkpoint.evaluation import dice
from benchmarks.demo_checkpoint.recipe import CHECKPOINT, RESULT
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.transforms import pixel_values

ROOT = Path(__file__).parents[1]
STYLES: tuple[phantoms.Style, ...] = ("ultrasound", "ct", "folded")


@pytest.mark.parametrize("style", STYLES)
def test_a_seed_is_a_phantom(style: phantoms.Style) -> None:
    first, again, other = (phantoms.phantom((9, seed), style, depth=4) for seed in (1, 1, 2))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.pixels, other.pixels)
    assert first.pixels.shape == first.labels.shape == (4, network.SIZE, network.SIZE)
    assert first.pixels.dtype == np.uint8


@pytest.mark.parametrize("style", STYLES)
def test_structures_are_seen_and_vary_slowly_over_depth(style: phantoms.Style) -> None:
    for seed in range(4):
        drawn = phantoms.phantom((9, seed), style, depth=network.CHUNK)
        structures = chunks.structures_of(drawn.labels, pixels=400 * network.CHUNK)
        for k in structures:
            mask = drawn.labels == k
            assert dice(mask[3], mask[4]) > 0.8
            assert not np.array_equal(mask[0], mask[-1])


def test_structures_stand_out() -> None:
    for seed in range(4):
        for style in chunks.STYLES:
            drawn = phantoms.phantom((9, seed), style, depth=1)
            for k in chunks.structures_of(drawn.labels, pixels=400):
                mask = torch.from_numpy(drawn.labels == k)
                near = torch.nn.functional.max_pool2d(mask.float(), 21, stride=1, padding=10) > 0
                around = (near & ~mask).numpy() & (drawn.labels == 0)
                assert abs(drawn.pixels[mask.numpy()].mean() - drawn.pixels[around].mean()) > 5
        tissue = phantoms.phantom((9, seed), "folded", depth=1)
        first, two = (tissue.pixels[tissue.labels == k].mean() for k in (1, 2))
        assert abs(first - two) > 10


def test_nothing_held_out_is_trained_on() -> None:
    trained = {z for window in chunks.train_windows() for z in window}
    assert trained <= set(chunks.SLICES)
    assert {len(window) for window in chunks.train_windows()} == {network.CHUNK}
    held_out = chunks.TEST_BLOCKS + chunks.VALIDATION_BLOCKS
    for block in held_out:
        assert len(block) == network.CHUNK
        assert set(block) <= set(chunks.SLICES)
        assert all(abs(z - other) > chunks.GAP for z in block for other in trained)
    assert len({z for block in held_out for z in block}) == network.CHUNK * len(held_out)
    assert len({chunks.TRAIN, chunks.VALIDATION, chunks.TEST}) == 3


def test_phantom_chunks_are_of_their_seed_alone() -> None:
    trained, tested = (chunks.phantom_chunk((split, 2, 0)) for split in (chunks.TRAIN, chunks.TEST))
    assert list(tested.structures) == ["phantom"]
    assert tested.structures["phantom"].sum() >= 150 * network.CHUNK
    assert not np.array_equal(trained.image, tested.image)


def test_a_phantom_is_prompted_for_two_of_its_structures(tmp_path: Path) -> None:
    chunks_of_both = examples.Chunks(2, tmp_path, lambda done: None)
    drawn = [chunks_of_both.example(np.random.default_rng((6, i))) for i in range(12)]
    phantom = [example for example in drawn if len(example.coords) == 2 * network.CHUNK]
    brain = [example for example in drawn if len(example.coords) == network.CHUNK]
    assert len(phantom) + len(brain) == len(drawn)
    for example in phantom:
        assert not example.target[:, :3].any()
        assert example.target[:, 3].flatten(1).any(dim=1).sum() > 2
        assert torch.equal(example.coords[0], example.coords[2])  # in turn for every slice
        both = example.target[0::2, 3] * example.target[1::2, 3]
        assert both.sum() == 0 or torch.equal(example.target[0::2], example.target[1::2])
        assert torch.equal(example.weight, torch.tensor([[0.1, 0.1, 0.1, 1.0]] * 2))
    for example in brain:
        white, grey, all_tissue, other = example.target.transpose(0, 1)
        assert torch.equal(torch.maximum(white, grey), all_tissue)
        assert not other.any()
        assert torch.allclose(example.weight, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.1]]))
    assert phantom
    assert brain


def test_the_bases_masks_are_tissues_and_what_was_prompted(tmp_path: Path) -> None:
    images = examples.PhantomImages(5, tmp_path, lambda done: None)
    drawn = images.example(np.random.default_rng(3), batch=12)
    assert drawn.target.shape == (12 * examples.PROMPTS, 4, network.SIZE, network.SIZE)
    assert drawn.weight[:, network.PROMPTED].all()
    folded = drawn.weight[:, 0] > 0
    assert folded.any()
    assert not drawn.weight[~folded, :3].any()
    inner, outer, both, prompted = drawn.target[folded].transpose(0, 1)
    assert torch.equal(both, inner + outer)
    assert prompted.flatten(1).any(dim=1).all()
    for coords, structure in zip(drawn.coords, drawn.target[:, network.PROMPTED], strict=True):
        if drawn.labels[0, 0] == 2:
            rows, columns = structure.nonzero().T
            assert abs(coords[0, 0] - columns.min()) < 20
            assert abs(coords[1, 1] - rows.max()) < 20


def a_comparison(target: torch.Tensor, weight: torch.Tensor, *, depth: int = 1) -> training.Example:
    """Black images, one for each target."""
    return training.Example(
        image=torch.zeros(len(target), 3, network.SIZE, network.SIZE),
        coords=INPUTS[0],
        labels=INPUTS[1],
        target=target,
        weight=weight,
        depth=depth,
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_masks_count_as_weighted_and_by_whole_chunks(depth: int) -> None:
    target = torch.zeros(2, 4, network.SIZE, network.SIZE)
    target[0, :, :64] = 1
    right = 20 * torch.nn.functional.avg_pool2d(target, 2) - 10
    wrong = right * torch.tensor([1, 1, -1, 1])[:, None, None]
    iou = torch.ones(2, 4)
    counted, every = (
        a_comparison(target, torch.tensor([[1, 1, third, 1]] * (2 // depth)), depth=depth)
        for third in (0, 1)
    )
    assert training.loss_of(right, iou, every) < 0.02
    assert training.loss_of(wrong, iou, every) > 5
    assert training.loss_of(wrong, iou, counted) < 0.02


def test_a_pixel_too_many_in_an_empty_mask_is_no_catastrophe() -> None:
    empty = torch.zeros(1, 4, network.SIZE, network.SIZE)
    logits = torch.full((1, 4, 128, 128), -20.0)
    logits[..., 0, 0] = 0
    loss = training.loss_of(logits, torch.ones(1, 4), a_comparison(empty, torch.ones(1, 4)))
    assert loss < 0.05


def test_the_base_is_trained_to_keep_the_image_and_the_help_is_dropped() -> None:
    network_of_base = network.DemoNetwork(network.base_tensors(3))
    assert network_of_base.reconstruction is not None
    assert network.DemoNetwork(plain_base(3)).reconstruction is None
    target = torch.zeros(1, 4, network.SIZE, network.SIZE)
    example = a_comparison(target, torch.zeros(1, 4))  # no mask counts
    with torch.no_grad():
        network_of_base.reconstruction.weight.zero_()
        network_of_base.reconstruction.bias.zero_()
    black = training.step(network_of_base, example)
    white = training.step(
        network_of_base, dataclasses.replace(example, image=torch.ones_like(example.image))
    )
    assert black == 0
    assert white.item() == pytest.approx(training.RECONSTRUCTION_WEIGHT)


def test_white_matter_is_read_out_of_the_base() -> None:
    readouts = readout.readouts(plain_base(3))
    assert list(readouts) == ["last block", "neck", "upscaled"]
    assert all(0 <= value < 1 for value in readouts.values())


def test_the_first_images_are_smaller_than_the_frame_of_their_prompts(tmp_path: Path) -> None:
    images = examples.PhantomImages(4, tmp_path, lambda done: None)
    large, small = (
        images.example(np.random.default_rng(2), batch=2, shrunk=shrunk) for shrunk in (1, 2)
    )
    half = network.SIZE // 2
    assert small.image.shape == (2, 3, half, half)
    assert torch.allclose(small.image, torch.nn.functional.avg_pool2d(large.image, 2), atol=1e-6)
    assert torch.equal(small.coords, large.coords)
    logits, _ = network.DemoNetwork(plain_base(3))(small.image, small.coords, small.labels)
    assert logits.shape == (2 * examples.PROMPTS, 4, half // 2, half // 2)


def test_clicks_lie_in_the_structure_and_boxes_around_it() -> None:
    mask = np.zeros((8, 40, 60), bool)
    mask[2:7, 10:20, 30:50] = True
    rng = np.random.default_rng(4)
    for _ in range(20):
        clicks = prompts.sample(rng, mask, clicks=3)
        assert all(mask[4, int(y), int(x)] for x, y in clicks.points)
        assert clicks.box is None
        box = prompts.sample(rng, mask, clicks=0).box
        assert box is not None
        reach = prompts.JITTER * 20 + 1
        assert np.abs(box - (30, 10, 50, 20)).max() <= reach


def test_clicks_go_where_the_structure_is_largest_if_the_middle_is_empty() -> None:
    mask = np.zeros((8, 40, 60), bool)
    mask[1, 5:9, 5:9] = True
    ((x, y),) = prompts.sample(np.random.default_rng(4), mask, clicks=1).points
    assert mask[1, int(y), int(x)]


def test_the_decoder_gets_row_before_column() -> None:
    prompt = prompts.Prompt(
        points=np.array([[30, 7]], np.float32), labels=np.ones(1, np.float32), box=None, mask=None
    )
    coords, labels = prompts.decoder_inputs(prompt, prompts.FRAME)
    assert coords.tolist() == [[[7, 30], [0, 0]]]
    assert labels.tolist() == [[1, -1]]


def plain_base(seed: int) -> dict[str, torch.Tensor]:
    """A SAM alone, without what helps to train it."""
    return {
        key: value
        for key, value in network.base_tensors(seed).items()
        if not key.startswith(network.RECONSTRUCTION)
    }


INPUTS = (torch.tensor([[[100.0, 80.0], [180.0, 190.0]]]), torch.tensor([[2.0, 3.0]]))


def test_swapped_coordinates_are_matched_by_the_attention_to_the_image() -> None:
    model = network.DemoNetwork(plain_base(3))
    positions = model.prompt_encoder.get_dense_pe()[0].flatten(1).T  # (g², C)
    attention = model.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    with torch.inference_mode():
        row, column = 4, 19
        middle = (torch.tensor([[[row, column]]]) + 0.5) * network.PATCH - 0.5
        point = model.prompt_encoder.sparse(middle, torch.tensor([[1.0]]))[0]
        point = point - model.prompt_encoder.point_embeddings[1].weight
        scores = attention.q_proj(point) @ attention.k_proj(positions).T
    assert divmod(int(scores.argmax()), network.GRID) == (row, column)


def test_fresh_adapters_change_nothing() -> None:
    base = plain_base(3)
    image = torch.rand(8, 3, network.SIZE, network.SIZE, generator=torch.manual_seed(1))
    with torch.inference_mode():
        alone, _ = network.DemoNetwork(base)(image, *INPUTS)
        adapted, _ = network.DemoNetwork(base | network.adapter_tensors(4))(image, *INPUTS)
    assert torch.equal(alone, adapted)


def test_parts_are_switched_off_and_on_again() -> None:
    tensors = plain_base(3) | network.adapter_tensors(4)
    generator = torch.manual_seed(2)
    for key, value in tensors.items():
        if "_Adapter." in key:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    model = network.DemoNetwork(tensors)
    image = torch.rand(8, 3, network.SIZE, network.SIZE, generator=generator)
    with torch.inference_mode():
        full, _ = model(image, *INPUTS)
        with model.without_depth():
            flat, _ = model(image, *INPUTS)
            single, _ = model(image[:1], *INPUTS)
        with model.without_prompt_conditioning():
            unconditioned, _ = model(image, *INPUTS)
        again, _ = model(image, *INPUTS)
    assert torch.equal(full, again)
    assert not torch.allclose(full, flat)
    assert not torch.allclose(full, unconditioned)
    assert torch.allclose(flat[:1], single, atol=1e-4)  # without SD-Trans, slices are independent


def test_only_adapters_and_output_heads_are_trained_in_the_second_stage() -> None:
    base, added = plain_base(3), network.adapter_tensors(4)
    assert all(map(network.is_trained_with_adapters, added))
    trained = {key.split(".")[1] for key in base if network.is_trained_with_adapters(key)}
    assert trained == {
        "mask_tokens",
        "output_hypernetworks_mlps",
        "output_upscaling",
        "iou_prediction_head",
    }


def a_stage(steps: int, **changes: object) -> training.Stage:
    """Training of adapters on noise: an example is a matter of the generator alone."""

    def example(rng: np.random.Generator) -> training.Example:
        target = torch.zeros(network.CHUNK, 4, network.SIZE, network.SIZE)
        target[:, :, 60:120, 60:120] = 1
        image = torch.from_numpy(rng.random((network.CHUNK, 3, 64, 64), np.float32))
        return training.Example(
            image=image,
            coords=INPUTS[0],
            labels=INPUTS[1],
            target=target,
            weight=torch.ones(1, 4),
            depth=network.CHUNK,
        )

    fields = {
        "name": "test",
        "number": 3,
        "seed": 5,
        "steps": steps,
        "rate": 1e-3,
        "example": example,
        "is_trained": network.is_trained_with_adapters,
    }
    return training.Stage(**fields | changes)


@pytest.mark.slow  # test_demo_automatic resumes a training in every run
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    tensors = plain_base(3) | network.adapter_tensors(4)
    seen: list[int] = []

    def interrupted(done: int, loss: float) -> None:
        seen.append(done)
        if len(seen) == 13:
            raise KeyboardInterrupt

    uninterrupted, _ = training.train(a_stage(20), tensors, tmp_path / "whole.pt", save_every=100)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            a_stage(20), tensors, tmp_path / "state.pt", save_every=5, on_step=interrupted
        )
    resumed, figures = training.train(
        a_stage(20), tensors, tmp_path / "state.pt", save_every=5, on_step=interrupted
    )
    assert seen == [*range(1, 14), *range(11, 21)]  # three steps were lost and done again
    assert figures["steps"] == 20
    assert figures["cpu_seconds"] > 0
    assert all(torch.equal(value, uninterrupted[key]) for key, value in resumed.items())
    changed = {key for key, value in uninterrupted.items() if not torch.equal(value, tensors[key])}
    assert changed
    assert all(map(network.is_trained_with_adapters, changed))
    assert not list(tmp_path.glob(".medsa-*"))


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    tensors = plain_base(3) | network.adapter_tensors(4)
    training.train(a_stage(1), tensors, tmp_path / "state.pt", save_every=1)
    with pytest.raises(SystemExit, match="seed 5"):
        training.train(a_stage(1, seed=6), tensors, tmp_path / "state.pt", save_every=1)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [training.schedule(done, 1000) for done in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == 1
    assert rates[699] == 1
    assert 0 < rates[-1] < 0.01


def test_the_checkpoint_shows_what_it_is() -> None:
    assert CHECKPOINT.stat().st_size <= 16e6
    checkpoint = load_checkpoint(CHECKPOINT)
    assert checkpoint.public_training
    assert checkpoint.source.dtype == "float16"
    architecture = infer(checkpoint, Overrides(classes=4))
    facts = architecture.network
    assert (facts.widths, facts.depths, facts.heads) == ((128,), (8,), (2,))
    assert (facts.windows, facts.global_blocks, facts.image_size) == ((8,), (3, 7), 256)
    assert (facts.rel_pos, facts.outputs, facts.classes) == ("real", "classes", 4)
    assert set(facts.adapters) == {"space", "mlp", "hyp", "decoder-mlp", "decoder-image"}
    assert (facts.hyp_lengths, facts.hyp_prompt_length) == ((64, 32, 64), 32)
    assert (architecture.conventions.preprocess, architecture.conventions.point_order) == (
        "medsa",
        "yx",
    )


@torch.inference_mode()
def test_the_checkpoint_segments_a_held_out_block() -> None:
    """One box around the brain, and all its classes, close to the figures published."""
    model = network.DemoNetwork(load_checkpoint(CHECKPOINT).tensors)
    chunk = chunks.Template().chunk(chunks.TEST_BLOCKS[1])
    prompt = prompts.sample(np.random.default_rng(1), chunk.structures["brain"], clicks=0)
    image = torch.from_numpy(chunk.image)[:, None].expand(-1, 3, -1, -1)
    logits, _ = model(image, *prompts.decoder_inputs(prompt, chunk.frame))
    masks = pixel_values(logits.numpy(), chunk.frame, "sam") > 0
    published = json.loads(RESULT.read_text())["dice"]["test"]["adapted"]["box"]
    for i, name in enumerate(network.CLASSES[:3]):
        assert dice(masks[:, i], chunk.structures[name]) > published[name] - 0.05
    assert masks[:, 3].mean() < 0.01


def test_the_model_card_holds_the_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    card = tables.CARD.read_text()
    assert tables.with_tables(card, tables.CARD_TABLES) == card
