"""The decoder in two parts: equal to the whole, run by the session, judged by verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import accept_changes, call, copied, manifest_data
from golden_cases import GoldenCase, export_options, relative_l2

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest, manifest_from_json
from medsa_deploy.errors import BundleError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.interface import PARTS

LIMIT, IOU_LIMIT, ONNX_LIMIT = 3e-6, 3e-5, 2e-5
CLICK = [(40.0, 50.0)]
INPUTS = ("image_tokens", "image_key", "image_value", "image_query")


@pytest.fixture(scope="module")
def hyp(bundle_of) -> Path:
    return bundle_of("medsa_hyp_2d")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return seeded_image(160, 5)[:120]


@pytest.fixture
def session(hyp: Path) -> Iterator[Session]:
    with load(hyp, threads=2) as opened:
        yield opened


@pytest.mark.parametrize(
    "name",
    [
        "medsa_hyp_2d",
        "medsa_hyp_2d_public_decoder",
        "medsa_2d_box_mask_two_classes",
        "medsa_mobile",
        "medsa_efficient",
    ],
)
@torch.inference_mode()
def test_the_parts_are_the_checkpoints_own_decoder(checkpoint_of, name: str) -> None:
    """HyP-Adpt, both two-way forms, several classes, SAM's outputs, EfficientSAM; every T."""
    loaded = load_checkpoint(checkpoint_of(name))
    network = infer(loaded, Overrides(**export_options(name))).network
    reference = build_reference(network, loaded.tensors)
    folded = fold(reference)
    g, size = network.embedding_size, network.image_size
    torch.manual_seed(3)
    for embeddings, sets, points in ((1, 1, 1), (1, 3, 2), (3, 1, 7), (2, 2, 20)):
        embedding = 0.5 * torch.randn(embeddings, 256, g, g)
        coords = size * torch.rand(sets, points, 2)
        labels = torch.randint(-1, 4, (sets, points)).float()
        expected = reference.decode(embedding, coords, labels)
        outputs = folded.click_part(*folded.image_part(embedding), coords, labels)
        for limit, actual, other in zip((LIMIT, IOU_LIMIT), outputs, expected, strict=True):
            assert actual.shape == other.shape
            assert relative_l2(actual.numpy(), other.numpy()) <= limit


def opened(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options)


def run(graph: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(names, inputs), strict=True))


def test_the_graphs_broadcast_as_the_whole_decoder(hyp: Path) -> None:
    decoder, image, click = (opened(hyp / f"{name}.onnx") for name in ("decoder", *PARTS))
    rng = np.random.default_rng(2)
    for embeddings, sets, points in ((1, 1, 2), (1, 3, 1), (3, 1, 2), (3, 3, 4)):
        inputs = {"image_embeddings": rng.normal(0, 0.5, (embeddings, 256, 16, 16)).astype("f")}
        prompts = {
            "point_coords": rng.uniform(0, 256, (sets, points, 2)).astype("f"),
            "point_labels": rng.integers(-1, 4, (sets, points)).astype("f"),
        }
        no_mask = {
            "mask_input": np.zeros((sets, 1, 64, 64), "f"),
            "has_mask_input": np.zeros(1, "f"),
        }
        expected = run(decoder, inputs | prompts | no_mask)
        outputs = run(click, run(image, inputs) | prompts)
        assert outputs.keys() == expected.keys()
        for name, values in expected.items():
            assert outputs[name].shape == values.shape
            assert relative_l2(outputs[name], values) <= ONNX_LIMIT
    two = run(image, {"image_embeddings": np.zeros((2, 256, 16, 16), "f")})
    three = {"point_coords": np.zeros((3, 1, 2), "f"), "point_labels": np.ones((3, 1), "f")}
    with pytest.raises(Exception, match=r"(?i)broadcast|dimension|bounds"):
        run(click, two | three)


def test_nothing_of_the_image_is_copied_by_a_click(hyp: Path) -> None:
    """Its inputs go into products and sums, which broadcast."""
    nodes = onnx.load(hyp / "decoder-click.onnx").graph.node
    readers = [n.op_type for n in nodes for name in n.input if name in INPUTS]
    assert set(readers) <= {"MatMul", "Add", "Shape"}


def test_the_manifest_lists_the_parts_and_their_parity(hyp: Path) -> None:
    manifest = load_manifest(hyp)
    assert [manifest.file(role).path for role in PARTS] == [f"{role}.onnx" for role in PARTS]
    assert manifest.graphs["decoder-click"].outputs == manifest.graphs["decoder"].outputs
    split = manifest.parity[0].split
    assert split is not None
    assert split.tensors["low_res_masks"].relative_l2 <= ONNX_LIMIT
    assert split.mask_pixels_differing <= 1e-4


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_clicks_run_the_click_part_and_masks_the_whole(hyp: Path, image, backend: str) -> None:
    with load(hyp, backend=backend, threads=2) as session:
        embedding = session.encode(image)
        assert embedding.image_part is not None
        parts = session.segment(embedding, points=CLICK)
        prediction = session.segment(replace(embedding, image_part=None), points=CLICK)
        assert relative_l2(parts.low_res_logits, prediction.low_res_logits) <= ONNX_LIMIT
        assert (parts.low_res_logits != prediction.low_res_logits).any(), "two graphs"
        mask = parts.low_res_logits[0, 0]
        refined = session.segment(embedding, points=CLICK, mask=mask)
        again = session.segment(replace(embedding, image_part=None), points=CLICK, mask=mask)
        np.testing.assert_array_equal(refined.low_res_logits, again.low_res_logits)


def test_a_bundle_without_the_parts_works(hyp: Path, image, session: Session, tmp_path) -> None:
    """As bundles from before them do."""
    copy = copied(hyp, tmp_path)
    path = copy / "manifest.json"
    data = manifest_data(copy)
    data["files"] = [entry for entry in data["files"] if entry["role"] not in PARTS]
    for role in PARTS:
        del data["graphs"][role]
        (copy / f"{role}.onnx").unlink()
    del data["parity"][0]["split"]
    path.write_text(json.dumps(data))
    expected = session.segment(session.encode(image), points=CLICK)
    with load(copy, threads=2) as earlier:
        embedding = earlier.encode(image)
        assert embedding.image_part is None
        prediction = earlier.segment(embedding, points=CLICK)
        # an embedding goes from one session to another
        other = earlier.segment(session.encode(image), points=CLICK)
    assert relative_l2(prediction.low_res_logits, expected.low_res_logits) <= ONNX_LIMIT
    np.testing.assert_array_equal(other.low_res_logits, prediction.low_res_logits)
    assert call("verify", copy).code == 0


def test_a_manifest_of_parities_in_parities_is_refused(hyp: Path) -> None:
    data = manifest_data(hyp)
    innermost = data["parity"][0]
    for _ in range(400):
        innermost["split"] = dict(innermost, split=None)
        innermost = innermost["split"]
    with pytest.raises(BundleError, match=r"nested too deeply|not JSON"):
        manifest_from_json(json.dumps(data))


def test_another_networks_click_part_is_detected(bundle: Path, hyp: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    shutil.copy(hyp / "decoder-click.onnx", copy / "decoder-click.onnx")
    accept_changes(copy)
    done = call("verify", copy, "--json")
    assert done.code == 1
    assert done.json["failures"]
    assert all("decoder in two parts" in line for line in done.json["failures"])


def test_a_changed_part_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    (copy / "decoder-click.onnx").write_bytes(b"")
    done = call("verify", copy)
    assert done.code == 2
    assert "decoder-click.onnx" in done.err


def test_golden_slices_share_one_prompt_set(bundle_of) -> None:
    """3D: E embeddings of a chunk and one set with the clicks of all of them."""
    case = GoldenCase("medsa_3d_chunk6")
    folder = bundle_of(case.name)
    coords, labels = case.coords_and_labels
    image, click = (opened(folder / f"{role}.onnx") for role in PARTS)
    part = run(image, {"image_embeddings": case.expected["image_embeddings"]})
    outputs = run(click, part | {"point_coords": coords, "point_labels": labels})
    assert relative_l2(outputs["low_res_masks"], case.expected["low_res_logits"]) <= ONNX_LIMIT
    assert relative_l2(outputs["iou_predictions"], case.expected["iou_predictions"]) <= ONNX_LIMIT
