"""The spine: golden ≙ reference ≙ folded ≙ ONNX, from the checkpoint file through the command line.

Limits against torch are tight because wrong readings of the network (a norm's eps) hide below 1e-5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from golden_cases import CASES_2D, VIT_3D, GoldenCase, export_options, relative_l2

from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork

CASES = CASES_2D + VIT_3D
TORCH_LIMIT = 3e-6
TORCH_IOU_LIMIT = 3e-5
ONNX_LIMIT = 2e-5
ONNX_IOU_LIMIT = 1e-4


def reference_of(case: GoldenCase, checkpoint: Path) -> ReferenceNetwork:
    loaded = load_checkpoint(checkpoint)
    network = infer(loaded, Overrides(**export_options(case.name))).network
    return build_reference(network, loaded.tensors)


def mask_inputs(case: GoldenCase, sets: int) -> dict[str, np.ndarray]:
    """`mask_input` and `has_mask_input`, for a decoder that has them."""
    if case.efficient:
        return {}
    has_mask = case.mask_input is not None
    side = case.size // 4
    return {
        "mask_input": case.mask_input if has_mask else np.zeros((sets, 1, side, side), np.float32),
        "has_mask_input": np.array([has_mask], np.float32),
    }


def assert_close(case: GoldenCase, actual: dict[str, np.ndarray], limit: float, iou: float) -> None:
    for name, value in actual.items():
        expected = case.expected[name]
        sam_outputs = case.name == "medsa_mobile" or case.efficient
        if sam_outputs and name in ("low_res_logits", "iou_predictions"):
            value = value[:, :1]  # mask 0 is the one a single mask takes
        assert value.shape == expected.shape
        assert relative_l2(value, expected) <= (iou if name == "iou_predictions" else limit), name


@pytest.mark.parametrize("name", CASES)
def test_reference_is_golden(name: str, checkpoint_of) -> None:
    case = GoldenCase(name)
    reference = reference_of(case, checkpoint_of(name))
    coords, labels = map(torch.from_numpy, case.coords_and_labels)
    mask = None if case.mask_input is None else torch.from_numpy(case.mask_input)
    embeddings = reference.encode(torch.from_numpy(case.image))
    logits, iou = reference.decode(embeddings, coords, labels, mask)
    sparse = reference.prompt_encoder.sparse(coords, labels)
    actual = {
        "image_embeddings": embeddings,
        "sparse_embeddings": sparse,
        "low_res_logits": logits,
        "iou_predictions": iou,
    }
    assert_close(case, {k: v.numpy() for k, v in actual.items()}, TORCH_LIMIT, TORCH_IOU_LIMIT)


@pytest.mark.parametrize("name", CASES)
def test_folded_is_golden(name: str, checkpoint_of) -> None:
    case = GoldenCase(name)
    folded = fold(reference_of(case, checkpoint_of(name)))
    coords, labels = map(torch.from_numpy, case.coords_and_labels)
    masks = map(torch.from_numpy, mask_inputs(case, len(coords)).values())
    with torch.inference_mode():
        embeddings = folded.encoder(torch.from_numpy(case.image))
        logits, iou = folded.decoder(embeddings, coords, labels, *masks)
    actual = {"image_embeddings": embeddings, "low_res_logits": logits, "iou_predictions": iou}
    assert_close(case, {k: v.numpy() for k, v in actual.items()}, TORCH_LIMIT, TORCH_IOU_LIMIT)


@pytest.mark.parametrize("name", CASES)
def test_golden_through_the_command_line(name: str, bundle_of) -> None:
    case, bundle = GoldenCase(name), bundle_of(name)
    manifest = load_manifest(bundle)
    assert manifest.network.classes == export_options(name).get("classes", 1)
    assert manifest.parity[0].mask_pixels_differing <= 1e-4

    encoder, decoder = (ort.InferenceSession(bundle / f"{n}.onnx") for n in ("encoder", "decoder"))
    (embeddings,) = encoder.run(None, {"image": case.image})
    coords, labels = case.coords_and_labels
    logits, iou = decoder.run(
        ["low_res_masks", "iou_predictions"],
        {
            "image_embeddings": embeddings,
            "point_coords": coords,
            "point_labels": labels,
            **mask_inputs(case, len(coords)),
        },
    )
    actual = {"image_embeddings": embeddings, "low_res_logits": logits, "iou_predictions": iou}
    assert_close(case, actual, ONNX_LIMIT, ONNX_IOU_LIMIT)
