"""Session: bundles and options that open one, or are refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import accept_changes, copied, edit_manifest
from fake_backend import BOXES, assert_same

from medsa_deploy import load
from medsa_deploy.errors import BundleError, UsageError
from medsa_deploy.evaluation.cases import seeded_image


# Bundles
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, UsageError, "unknown backend 'cuda'; there are: onnxruntime"),
        ({"precision": "int8"}, BundleError, "has no encoder in int8; it has: fp32"),
        ({"threads": 0}, UsageError, "threads is 0, expected a whole number from 1 to 1024"),
        ({"threads": -2}, UsageError, "threads is -2, expected a whole number from 1 to 1024"),
    ],
)
def test_options_that_cannot_be_used(bundle: Path, options, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load(bundle, **options)


def test_threads_change_the_speed_not_the_masks(bundle: Path, image) -> None:
    predictions = []
    for threads in (1, 2, None):
        with load(bundle, threads=threads) as session:
            assert session.backend.facts()["threads"] == threads or "all"
            predictions.append(session.segment(session.encode(image), box=BOXES))
    assert_same(predictions[0], predictions[1])
    assert_same(predictions[0], predictions[2])


def test_two_threads_on_one_session_get_their_own_masks(session) -> None:
    images = [seeded_image(64, seed) for seed in range(4)]

    def segment(i: int) -> np.ndarray:
        return session.segment(session.encode(images[i]), points=[(10, 20)]).low_res_logits

    expected = [segment(i) for i in range(4)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(segment, [i % 4 for i in range(32)]))
    for i, logits in enumerate(results):
        np.testing.assert_allclose(logits, expected[i % 4], atol=1e-5)


def test_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing\.medsa does not exist: make a bundle with"):
        load(tmp_path / "nothing.medsa")
    (tmp_path / "file.medsa").write_text("x")
    with pytest.raises(BundleError, match="is a file, not a bundle folder"):
        load(tmp_path / "file.medsa")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
def test_a_changed_byte_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = copied(bundle, tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not the file the manifest describes"):
        load(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("content", [b"not a graph", b"", b"\x08\x09\x12\x00" + bytes(200)])
def test_a_file_that_is_no_graph_is_refused(bundle, tmp_path, name: str, content: bytes) -> None:
    copy = copied(bundle, tmp_path)
    (copy / name).write_bytes(content)
    accept_changes(copy)
    with pytest.raises(BundleError, match=f"{name} is not a graph ONNX Runtime can load: .+"):
        load(copy)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("encoder", "decoder", "low_res_masks is absent, the manifest says float32"),
        ("two classes", "decoder", r"iou_predictions is float32 \(\*, 2\), the manifest says"),
    ],
)
def test_another_graph_is_refused(
    bundle: Path, bundle_of, tmp_path: Path, source: str, target: str, message: str
) -> None:
    copy = copied(bundle, tmp_path)
    two = bundle_of("medsa_2d_box_mask_two_classes") / "decoder.onnx"
    other = bundle / "encoder.onnx" if source == "encoder" else two
    (copy / f"{target}.onnx").write_bytes(other.read_bytes())
    accept_changes(copy)
    with pytest.raises(BundleError, match=message):
        load(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "manifest.json"])
def test_a_missing_file_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = copied(bundle, tmp_path)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        load(copy)


def test_another_schema_version_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    version = json.loads((copy / "manifest.json").read_text())["schema"]
    edit_manifest(copy, schema=version + 1)
    with pytest.raises(BundleError, match=f"schema version {version + 1}; this medsa-deploy reads"):
        load(copy)
