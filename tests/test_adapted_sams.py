"""Networks of other code than Med-SA's: golden ≙ reference ≙ folded ≙ ONNX; conventions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from direct_sam import DirectSAM
from golden_cases import ADAPTED_SAMS, GoldenCase, export_options, relative_l2, seeded
from invented import (
    Keys,
    efficient_keys,
    finetune_keys,
    med2d_keys,
    own_efficient_keys,
    rows,
    samed_keys,
    vit_keys,
    weights,
)

from medsa_deploy.bundle.manifest import Network, load_manifest
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import Checkpoint, load_checkpoint
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork

LIMIT, IOU_LIMIT, ONNX_LIMIT = 3e-6, 3e-5, 2e-5


def loaded(name: str, path: Path) -> Checkpoint:
    base = path.with_name(f"{name}-base.pth")
    return load_checkpoint(path, base=base if GoldenCase(name).base is not None else None)


def reference_of(name: str, path: Path) -> ReferenceNetwork:
    checkpoint = loaded(name, path)
    network = infer(checkpoint, Overrides(**export_options(name))).network
    return build_reference(network, checkpoint.tensors)


def no_mask(case: GoldenCase) -> dict[str, np.ndarray]:
    """What a decoder with mask prompts takes if there is none."""
    if case.efficient:
        return {}
    side = case.size // 4
    return {
        "mask_input": np.zeros((1, 1, side, side), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }


def assert_golden(case: GoldenCase, outputs: tuple[np.ndarray, ...], limit: float) -> None:
    names = ("image_embeddings", "low_res_logits", "iou_predictions")
    for name, value in zip(names, outputs, strict=True):
        assert value.shape == case.expected[name].shape
        bound = IOU_LIMIT if name == "iou_predictions" else limit
        assert relative_l2(value, case.expected[name]) <= bound, name


@pytest.mark.parametrize("name", ADAPTED_SAMS)
@torch.inference_mode()
def test_reference_and_folded_are_golden(name: str, checkpoint_of) -> None:
    case = GoldenCase(name)
    reference = reference_of(name, checkpoint_of(name))
    image = torch.from_numpy(case.image)
    coords, labels = map(torch.from_numpy, case.coords_and_labels)
    embeddings = reference.encode(image)
    outputs = (embeddings, *reference.decode(embeddings, coords, labels))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)

    folded = fold(reference)
    embeddings = folded.encoder(image)
    masks = map(torch.from_numpy, no_mask(case).values())
    outputs = (embeddings, *folded.decoder(embeddings, coords, labels, *masks))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)
    outputs = (embeddings, *folded.click_part(*folded.image_part(embeddings), coords, labels))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)


@pytest.mark.parametrize("name", ADAPTED_SAMS)
def test_golden_through_the_command_line(name: str, bundle_of) -> None:
    """The whole decoder and its parts, which clicks and unprompted images run through."""
    case, bundle = GoldenCase(name), bundle_of(name)
    parity = load_manifest(bundle).parity[0]
    assert parity.mask_pixels_differing <= 1e-4

    def run(graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(bundle / f"{graph}.onnx")
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))

    coords, labels = case.coords_and_labels
    prompts = {"point_coords": coords, "point_labels": labels}
    encoded = run("encoder", image=case.image)
    parts = run("decoder-image", **encoded)
    for decoded in (
        run("decoder", **encoded, **prompts, **no_mask(case)),
        run("decoder-click", **parts, **prompts),
    ):
        outputs = (*encoded.values(), decoded["low_res_masks"], decoded["iou_predictions"])
        assert_golden(case, outputs, ONNX_LIMIT)


# Other sizes, subsets, classes and prompts: against plain equations on the file's own keys

CLICKS = (
    (torch.zeros(0, 2), torch.zeros(0)),
    (torch.tensor([[30.0, 44.0], [99.5, 7.0], [0, 0]]), torch.tensor([1.0, 0, -1])),
    (torch.tensor([[10.0, 20], [70, 80]]), torch.tensor([2.0, 3])),
)
"""Nothing, clicks with SAM's padding point, a box."""


def assert_direct(checkpoint: Checkpoint, direct: DirectSAM, **options: object) -> Network:
    """Reference, folded and parts are the equations, for every prompt."""
    network = infer(checkpoint, Overrides(**options)).network
    reference = build_reference(network, checkpoint.tensors)
    folded = fold(reference)
    size = network.image_size
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    direct.heads, direct.window = network.heads[0], network.windows[0]
    direct.global_blocks = network.global_blocks
    with torch.inference_mode():
        expected = direct.encode(image)
        for encoder in (reference.encode, folded.encoder):
            assert relative_l2(encoder(image).numpy(), expected.numpy()) <= LIMIT
        embedding = reference.encode(image)[:1]
        no_mask = (torch.zeros(1, 1, size // 4, size // 4), torch.zeros(1))
        leaving = slice(reference.leaving.start, reference.leaving.stop)
        for coords, labels in CLICKS:
            masks, iou = (part[leaving] for part in direct.decode(embedding, coords, labels))
            prompts = (coords[None], labels[None])
            for outputs in (
                reference.decode(embedding, *prompts),
                folded.decoder(embedding, *prompts, *no_mask),
                folded.click_part(*folded.image_part(embedding), *prompts),
            ):
                assert outputs[0].shape == (1, network.masks, size // 4, size // 4)
                assert relative_l2(outputs[0][0].numpy(), masks.numpy()) <= LIMIT
                assert relative_l2(outputs[1][0].numpy(), iou.numpy()) <= IOU_LIMIT
    return network


def loaded_from(folder: Path, keys: Keys, base: Keys | None = None, *, seed: int = 5) -> Checkpoint:
    torch.save(weights(keys, rel_pos=0.2, seed=seed), folder / "x.pth")
    if base is None:
        return load_checkpoint(folder / "x.pth")
    torch.save(weights(base, rel_pos=0.2, seed=seed + 1), folder / "base.pth")
    return load_checkpoint(folder / "x.pth", base=folder / "base.pth")


TABLES = (27, 15, 27, 15)


@pytest.mark.parametrize(
    ("tables", "blocks"),
    [(TABLES, range(4)), ((27, 31), (1,)), ((27, 39, 27), (0, 2)), ((31, 31), (0, 1))],
)
def test_sam_med2d_of_other_sizes(tmp_path: Path, tables: Any, blocks: Any) -> None:
    keys = med2d_keys(vit_keys(tables=tables), blocks)
    network = assert_direct(loaded_from(tmp_path, keys), DirectSAM(weights(keys, rel_pos=0.2)))
    assert (network.family, network.outputs, network.masks) == ("sam_med2d", "sam", 4)


ADAPTERS = {"Space": (0, 2), "MLP": (0, 2), "Depth": (0, 2)}


@pytest.mark.parametrize(
    ("vit", "adapted", "options"),
    [
        ({"adapters": ADAPTERS, "mask_tokens": 3}, {"layers": (1,)}, {}),
        ({"adapters": ADAPTERS, "tables": (27, 39, 27, 39)}, {"layers": (0, 1)}, {}),
        ({"mask_tokens": 6}, {"layers": (0,)}, {}),
        ({"adapters": ADAPTERS, "mask_tokens": 3}, {}, {"trained_with": "finetune-sam"}),
        ({"mask_tokens": 5}, {}, {"trained_with": "finetune-sam"}),
        ({"mask_tokens": 3}, {"lora_blocks": (0, 3)}, {}),
        ({"mask_tokens": 9}, {"lora_blocks": range(4), "rank": 2}, {"classes": 7}),
        (
            {"mask_tokens": 4},
            {"lora_attentions": ("layers.1.self_attn", "layers.0.cross_attn_image_to_token")},
            {"classes": 3},
        ),
        (
            {"mask_tokens": 3},
            {"lora_blocks": (1,), "lora_attentions": ("final_attn_token_to_image",), "rank": 8},
            {},
        ),
    ],
)
def test_finetune_sam_of_any_subset(
    tmp_path: Path, vit: Any, adapted: Any, options: dict[str, Any]
) -> None:
    keys = finetune_keys(vit_keys(**{"tables": TABLES} | vit), **adapted)
    direct = DirectSAM(weights(keys, rel_pos=0.2), windows_first=True)
    network = assert_direct(loaded_from(tmp_path, keys), direct, **options)
    assert (network.family, network.outputs) == ("finetune_sam", "labels")
    assert network.masks == vit.get("mask_tokens", 4) - 1 == network.classes + 1


@pytest.mark.parametrize(
    ("classes", "small", "base_grid", "size"),
    [(1, False, 16, 128), (2, True, 16, 224), (8, False, 8, 208), (3, True, 16, 256)],
)
def test_samed_over_a_base_of_another_size(
    tmp_path: Path, classes: int, small: bool, base_grid: int, size: int
) -> None:
    """The base's positions are resized bilinearly, its global tables linearly."""
    base = vit_keys(tables=rows(4, 14, base_grid, (1, 3)))
    base["image_encoder.pos_embed"] = (1, base_grid, base_grid, 64)
    keys = samed_keys(base, classes, small=small)
    tensors = weights(base, rel_pos=0.2, seed=6) | weights(keys, rel_pos=0.2)
    direct = DirectSAM(tensors, positions="bilinear")
    network = assert_direct(loaded_from(tmp_path, keys, base), direct, image_size=size)
    assert (network.family, network.outputs, network.adapters) == ("samed", "labels", ("lora",))
    assert (network.classes, network.masks, network.image_size) == (classes, classes + 1, size)


def test_samed_saved_whole(tmp_path: Path) -> None:
    """Its keys are finetune-SAM's LoRA; the option says which code trained it."""
    keys = finetune_keys(vit_keys(tables=TABLES, mask_tokens=3), lora_blocks=range(4))
    checkpoint = loaded_from(tmp_path, keys)
    direct = DirectSAM(weights(keys, rel_pos=0.2), positions="bilinear")
    network = assert_direct(checkpoint, direct, trained_with="samed")
    assert (network.family, network.masks, network.classes) == ("samed", 3, 2)
    (guess,) = (g for g in infer(checkpoint, Overrides()).guesses if g.fact == "trained with")
    assert (guess.value, guess.option) == ("finetune-sam", "--trained-with")
    assert "samed" in guess.because


@pytest.mark.parametrize(("width", "depth", "size"), [(64, 2, 96), (192, 1, 256), (128, 3, 224)])
@torch.inference_mode()
def test_efficientsam_of_other_sizes(tmp_path: Path, width: int, depth: int, size: int) -> None:
    keys = own_efficient_keys(width=width, depth=depth)
    checkpoint = loaded_from(tmp_path, keys)
    found = infer(checkpoint, Overrides(image_size=size))
    reference = build_reference(found.network, checkpoint.tensors)
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    blocks = tuple(range(depth))
    direct = DirectSAM(weights(keys), heads=width // 64, window=0, global_blocks=blocks)
    expected = direct.encode(image).numpy()
    assert relative_l2(reference.encode(image).numpy(), expected) <= LIMIT
    assert relative_l2(fold(reference).encoder(image).numpy(), expected) <= LIMIT
    conventions = found.conventions
    assert (conventions.preprocess, conventions.postprocess) == ("efficientsam", "efficientsam")
    assert (conventions.point_order, conventions.point_scale, conventions.pad_points) == (
        "xy",
        1,
        6,
    )


@torch.inference_mode()
def test_efficientsam_as_a_base_of_adapters(tmp_path: Path) -> None:
    """Its names are the own code's; the network is the public Med-SA code's, whose eps differs."""
    whole = efficient_keys(grid=None)
    names = {"lin1": "fc1", "lin2": "fc2"}
    base = {re.sub(r"lin[12]", lambda m: names[m[0]], k): v for k, v in whole.items()}
    adapters = {k: v for k, v in whole.items() if "_Adapter." in k}
    base = {k: v for k, v in base.items() if "_Adapter." not in k}
    checkpoint = loaded_from(tmp_path, adapters, base)
    network = infer(checkpoint, Overrides(image_size=96)).network
    assert (network.family, network.adapters) == ("efficient_sam", ("space", "mlp"))
    tensors = weights(base, seed=6) | weights(adapters)
    direct = DirectSAM(tensors, heads=1, window=0, global_blocks=(0, 1), eps=1e-5)
    image = torch.from_numpy(seeded.image(4, (1, 3, 96, 96)))
    embedding = build_reference(network, checkpoint.tensors).encode(image)
    assert relative_l2(embedding.numpy(), direct.encode(image).numpy()) <= LIMIT
