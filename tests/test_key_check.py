"""Keys that do not fit are listed; networks of invented sizes are built and folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import relative_l2, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import ADAPTED, TABLES, changed, refusal
from invented import checkpoint, hollow, vit_keys, weights

from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.networks import build_reference, fold

LIMIT, IOU_LIMIT = 3e-6, 3e-5
BLOCK = "image_encoder.blocks.1."
LAYER = "mask_decoder.transformer.layers.0."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # unknown
        ({"hf_token.weight": (1, 256)}, ["unknown keys: hf_token.weight"]),
        ({f"{BLOCK}norm3.weight": (64,)}, ["unknown keys: image_encoder.blocks.1.norm3.weight"]),
        (
            {f"{LAYER}mlp.layers.0.0.weight": (2048, 256)},
            ["missing keys", "layers.1.mlp.layers.0.0.weight"],
        ),
        ({"image_encoder.blocks.99999999999.norm1.weight": (64,)}, ["unknown keys"]),
        ({"image_encoder.blocks.².norm1.weight": (64,)}, ["unknown keys"]),
        # missing
        ({f"{BLOCK}norm1.bias": None}, ["missing keys: image_encoder.blocks.1.norm1.bias"]),
        ({f"{BLOCK}mlp.lin1.weight": None}, ["image_encoder.blocks.1.mlp.lin1.weight"]),
        (
            {f"{BLOCK}attn.rel_pos_h": None},
            ["missing keys: image_encoder.blocks.1.attn.rel_pos_h"],
        ),
        (
            {f"{BLOCK}attn.rel_pos_w": None},
            ["missing keys: image_encoder.blocks.1.attn.rel_pos_w"],
        ),
        ({f"{BLOCK}Space_Adapter.D_fc2.bias": None}, ["Space_Adapter.D_fc2.bias", "--base"]),
        (
            {"image_encoder.neck.0.weight": None, "image_encoder.pos_embed": None},
            ["missing keys", "image_encoder.pos_embed", "image_encoder.neck.0.weight", "--base"],
        ),
        ({"mask_decoder.mask_tokens.weight": None}, ["mask_decoder.mask_tokens.weight"]),
        # of the wrong shape, also where a network built from it would agree with itself
        ({f"{BLOCK}norm1.bias": (63,)}, ["blocks.1.norm1.bias is (63,), expected (64,)"]),
        ({f"{BLOCK}mlp.lin1.weight": (256, 32)}, ["is (256, 32), expected (any, 64)"]),
        ({f"{BLOCK}mlp.lin1.weight": (256,)}, ["is (256,), expected (any, 64)"]),
        ({f"{BLOCK}attn.rel_pos_w": (15, 8)}, ["rel_pos_w is (15, 8), expected (any, 16)"]),
        (
            {
                f"{BLOCK}Space_Adapter.D_fc1.weight": (16, 1024),
                f"{BLOCK}Space_Adapter.D_fc2.weight": (1024, 16),
                f"{BLOCK}Space_Adapter.D_fc2.bias": (1024,),
            },
            ["Space_Adapter.D_fc1.weight is (16, 1024), expected (any, 64)"],
        ),
        ({"image_encoder.patch_embed.proj.weight": (64, 768)}, ["expected (C, 3, p, p)"]),
        ({"image_encoder.patch_embed.proj.weight": (64, 1, 16, 16)}, ["(64, 3, 16, 16)"]),
        ({"image_encoder.pos_embed": (4096, 64)}, ["expected (1, any, any, 64)"]),
        ({"image_encoder.neck.0.weight": (128, 64, 1, 1)}, ["expected (256, 64, 1, 1)"]),
        ({"mask_decoder.mask_tokens.weight": (0, 256)}, ["(0, 256), expected (any, 256)"]),
        ({"prompt_encoder.mask_downscaling.3.weight": (2, 0, 2, 2)}, ["mask_downscaling"]),
        (
            {f"{LAYER}cross_attn_token_to_image.q_proj.weight": (300, 256)},
            ["no network can be built from the checkpoint's shapes"],
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(changed(changes), CheckpointError)
    for word in words:
        assert word in message


def test_everything_that_does_not_fit_is_listed_once_for_all_blocks() -> None:
    keys = {k: v for k, v in vit_keys().items() if ".norm2.weight" not in k}
    keys["mask_decoder.iou_token.weight"] = (2, 256)
    message = refusal(keys, CheckpointError)
    assert "missing keys: image_encoder.blocks.*.norm2.weight (4×), mask_decoder" in message
    assert "(sam, 4 blocks of width 64)" in message
    assert "mask_decoder.iou_token.weight is (2, 256), expected (1, 256)" in message
    assert "--base" not in message  # nothing here is an adapter


def test_a_block_that_is_missing_is_listed_whole() -> None:
    keys = {k: v for k, v in vit_keys().items() if ".blocks.2." not in k}
    message = refusal(keys, CheckpointError, global_blocks=(1, 3))
    for name in ("norm1.weight", "attn.qkv.bias", "mlp.lin1.weight"):
        assert f"image_encoder.blocks.2.{name}" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_listed(dtype: torch.dtype) -> None:
    tensors = {k: torch.zeros(()).expand(shape) for k, shape in vit_keys().items()}
    for i in range(4):
        tensors[f"image_encoder.blocks.{i}.attn.qkv.weight"] = torch.zeros(192, 64, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"qkv.weight holds {kind}, expected floating"):
        infer(checkpoint(tensors), Overrides())


@settings(deadline=None)
@given(data=st.data())
def test_damaged_shapes_are_refused_or_run(data: st.DataObject) -> None:
    """One key taken out, renamed, or of another shape: refused, or a network that runs."""
    keys = vit_keys(
        tables=(27, 15), adapters={"Space": (0,), "MLP": (1,)}, hyp={0: (4, 8, 8)}, mask_tokens=5
    )
    key = data.draw(st.sampled_from(sorted(keys)))
    shape = keys.pop(key)
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 24, 27, 64, 128, 255, 256, 300]))
    match data.draw(st.sampled_from(["reshape", "resize", "rename", "remove"])):
        case "reshape":
            keys[key] = tuple(data.draw(st.lists(sizes, max_size=5)))
        case "resize" if shape:
            axis = data.draw(st.integers(0, len(shape) - 1))
            keys[key] = (*shape[:axis], data.draw(sizes), *shape[axis + 1 :])
        case "rename":
            keys[data.draw(st.sampled_from([f"{key}.x", key.replace("1", "7"), "x"]))] = shape
    loaded = hollow(keys)
    try:
        network = infer(loaded, Overrides()).network
    except (CheckpointError, UsageError):
        return
    if network.image_size <= 256:
        reference = build_reference(network, loaded.tensors)
        size = network.image_size
        embedding = reference.encode(torch.zeros(1, 3, size, size))
        masks, iou = reference.decode(embedding, torch.ones(1, 2, 2), torch.ones(1, 2))
        assert masks.shape == (1, network.masks, size // 4, size // 4)
        assert iou.shape == (1, network.masks)


@pytest.mark.parametrize(
    ("given_keys", "options"),
    [
        ({"tables": (27, 15)}, {}),
        ({"tables": (13, 15), "width": 128, "head_size": 64, "adapters": ADAPTED}, {}),
        ({"tables": (31, 15), "width": 192}, {"window_size": 16}),
        ({"tables": (27, 27), "adapters": {"Space": (1,)}}, {}),
        ({"tables": (27, 27, 27), "adapters": {"MLP": (0,)}, "form": "public"}, {}),
        ({"tables": TABLES, "adapters": {"Space": (0, 2), "MLP": (2, 3)}}, {}),
        ({"tables": TABLES, "adapters": ADAPTED}, {"image_size": 320}),
        ({"tables": (27, 15)}, {"global_blocks": (0, 1)}),
        (
            {"tables": (None, None), "width": 160, "adapters": ADAPTED},
            {"heads": 2, "image_size": 192, "global_blocks": (0,), "window_size": 5},
        ),
        ({"tables": (27, 15), "hyp": {1: (12, 16, 8, 24)}, "mask_tokens": 6}, {}),
        ({"tables": (27, 15), "hyp": {0: (4, 8)}, "form": "public"}, {"classes": 3}),
    ],
)
@torch.inference_mode()
def test_folded_networks_of_invented_sizes_agree(
    given_keys: dict[str, Any], options: dict[str, Any]
) -> None:
    loaded = checkpoint(weights(vit_keys(**given_keys), rel_pos=0.2))
    network = infer(loaded, Overrides(**options)).network
    reference = build_reference(network, loaded.tensors)
    folded = fold(reference)
    size = network.image_size
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    coords = torch.tensor([[[30.0, 40.0], [99.0, 7.5]], [[12.0, 70.0], [0.0, 0.0]]])
    labels = torch.tensor([[2.0, 3.0], [1.0, -1.0]])
    no_mask = torch.zeros(2, 1, size // 4, size // 4)

    embedding = reference.encode(image)
    masks, iou = reference.decode(embedding, coords, labels)
    assert relative_l2(folded.encoder(image).numpy(), embedding.numpy()) <= LIMIT
    folded_masks, folded_iou = folded.decoder(embedding, coords, labels, no_mask, torch.zeros(1))
    assert masks.shape == (2, network.masks, size // 4, size // 4)
    assert relative_l2(folded_masks.numpy(), masks.numpy()) <= LIMIT
    assert relative_l2(folded_iou.numpy(), iou.numpy()) <= IOU_LIMIT
