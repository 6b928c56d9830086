"""Networks of other code than Med-SA's: golden ≙ reference ≙ folded ≙ ONNX; conventions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import ADAPTED_SAMS, GoldenCase, export_options, relative_l2

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
