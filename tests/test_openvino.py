"""OpenVINO: the same masks as the golden ones, precisions, threads, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
from command_line import WITHOUT, accept_changes, call, copied, start
from golden_cases import GoldenCase, relative_l2
from onnx import TensorProto, helper

from medsa_deploy import load
from medsa_deploy.errors import BundleError, DeviceError, UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.evaluation.parity import MASK_PIXELS_LIMIT

CASES = ("medsa_2d", "medsa_hyp_2d", "medsa_3d_chunk6", "medsa_mobile", "medsa_efficient")
LIMIT = 2e-5
IOU_LIMIT = 1e-4


def limit(name: str) -> float:
    return IOU_LIMIT if name == "iou_predictions" else LIMIT


@pytest.mark.parametrize("name", CASES)
def test_float32_is_golden(name: str, bundle_of) -> None:
    case = GoldenCase(name)
    coords, labels = case.coords_and_labels
    with load(bundle_of(name), backend="openvino", threads=2) as session:
        assert session.backend.name == "openvino"
        assert session.backend.facts()["encoder_computes_in"] == "f32"
        embeddings = session.backend.encode(case.image)
        logits, iou = session.backend.decode(embeddings, coords, labels, case.mask_input)
    actual = {"image_embeddings": embeddings, "low_res_logits": logits, "iou_predictions": iou}
    for tensor, value in actual.items():
        expected = case.expected[tensor]
        if value.shape != expected.shape:
            value = value[:, : expected.shape[1]]  # SAM's outputs: mask 0 is the single mask
        assert relative_l2(value, expected) <= limit(tensor), tensor


@pytest.mark.parametrize("name", ["medsa_hyp_2d", "medsa_mobile", "medsa_efficient"])
def test_every_combination_of_sizes_is_as_in_onnxruntime(name: str, bundle_of) -> None:
    """E, P and N change from call to call, down as well as up, with a mask and without."""
    rng = np.random.default_rng(7)
    network = (opened := load(bundle_of(name), threads=1)).manifest.network
    g = network.embedding_size
    with opened, load(bundle_of(name), backend="openvino", threads=1) as other:
        for sets, (e, p, n) in enumerate([(3, 3, 2), (1, 3, 7), (3, 1, 1), (1, 1, 2), (2, 1, 3)]):
            embeddings = rng.normal(size=(e, 256, g, g)).astype(np.float32)
            coords = (rng.random((p, n, 2)) * network.image_size).astype(np.float32)
            labels = rng.integers(0, 2, (p, n)).astype(np.float32)
            mask = rng.normal(size=(p, 1, 4 * g, 4 * g)).astype(np.float32)
            takes_masks = opened.manifest.mask_prompt_size is not None
            prompts = (coords, labels, mask if sets % 2 and takes_masks else None)
            expected = opened.backend.decode(embeddings, *prompts)
            actual = other.backend.decode(embeddings, *prompts)
            for a, b, bound in zip(actual, expected, (LIMIT, IOU_LIMIT), strict=True):
                assert a.shape == b.shape
                assert relative_l2(a, b) <= bound, (e, p, n)


def test_a_session_for_many_callers_and_two_sessions_at_once(bundle: Path) -> None:
    image = seeded_image(100, 2)
    clicks = [(10.0 * i + 5, 50.0) for i in range(8)]
    with (
        load(bundle, backend="openvino", threads=1) as first,
        load(bundle, backend="openvino", threads=2) as two,
    ):
        embedding = first.encode(image)
        np.testing.assert_allclose(two.encode(image).values, embedding.values, atol=1e-4)

        def logits(i: int) -> np.ndarray:
            session = (first, two)[i % 2]
            return session.segment(embedding, points=[clicks[i % 8]]).low_res_logits

        expected = [logits(i) for i in range(8)]
        with ThreadPoolExecutor(4) as pool:
            for i, result in enumerate(pool.map(logits, range(24))):
                assert relative_l2(result, expected[i % 8]) <= LIMIT
    with pytest.raises(UsageError, match="closed"):
        first.encode(image)


def test_verify_on_the_command_line(bundle: Path) -> None:
    done = call("verify", bundle, "--backend", "openvino", "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert (parity["precision"], parity["backend"]) == ("fp32", "openvino")
    assert all(tensor["relative_l2"] <= LIMIT for tensor in parity["tensors"].values())


def test_run_gives_the_default_backends_mask(bundle: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(seeded_image(90, 3)).save(tmp_path / "image.png")
    for backend in ("onnxruntime", "openvino"):
        arguments = ["--point", "40,30", "--backend", backend, "-o", tmp_path / f"{backend}.png"]
        assert call("run", bundle, tmp_path / "image.png", *arguments).code == 0
    masks = [PIL.Image.open(tmp_path / f"{name}.png") for name in ("onnxruntime", "openvino")]
    assert (np.asarray(masks[0]) != np.asarray(masks[1])).mean() <= MASK_PIXELS_LIMIT


# Precisions


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bfloat16_where_the_processor_has_it(bundle: Path) -> None:
    done = call("verify", bundle, "--backend", "openvino", "--precision", "bf16", "--json")
    if not has_bf16():
        assert done.code == 2
        assert "does not compute in bf16: use fp32" in done.error
        return
    (parity,) = done.json["parity"]
    assert (parity["precision"], parity["backend"]) == ("bf16", "openvino")
    assert parity["tensors"]["image_embeddings"]["relative_l2"] > 1e-4, "bfloat16 rounds"
    assert parity["mask_dice_mean"] >= 0.95
    passed = parity["mask_dice_mean"] >= 0.995 and parity["mask_dice_worst"] >= 0.98
    assert done.code == (0 if passed else 1)
    with load(bundle, backend="openvino", precision="bf16") as session:
        assert session.backend.facts()["encoder_computes_in"] == "bf16"


def test_a_processor_without_bfloat16(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medsa_deploy.runtime.backends import openvino as module

    class Older(module.openvino.Core):
        def get_property(self, device: str, name: str) -> object:
            properties = super().get_property(device, name)
            return (
                [capability for capability in properties if capability != "BF16"]
                if "CAPABILITIES" in name
                else properties
            )

    monkeypatch.setattr(module.openvino, "Core", Older)
    done = call("verify", bundle, "--backend", "openvino", "--precision", "bf16")
    assert done.code == 2
    assert "does not compute in bf16: use fp32" in done.error


@pytest.mark.parametrize("backend", ["onnxruntime", "auto"])
def test_bfloat16_needs_openvino(bundle: Path, backend: str) -> None:
    done = call("verify", bundle, "--precision", "bf16", "--backend", backend)
    assert done.code == 2
    assert done.error == "bf16 is available only with openvino: add --backend openvino"


def test_int8_files_for_a_cpu(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        PIL.Image.fromarray(seeded_image(64, i)).save(tmp_path / "images" / f"{i}.png")
    copy = copied(bundle, tmp_path)
    arguments = ["--int8", "--for", "cpu", "--calibration", tmp_path / "images"]
    assert call("quantize", copy, *arguments).code == 0
    done = call("verify", copy, "--backend", "openvino", "--json")
    assert done.code == 0, done.err
    assert [parity["precision"] for parity in done.json["parity"]] == ["fp32", "int8-cpu"]
    with load(copy, precision="int8-cpu", backend="openvino") as session:
        kinds = {info["type"] for info in kinds_of(session)}
    assert any(kind.endswith(("_i8", "_u8")) for kind in kinds), kinds


def kinds_of(session) -> list[dict[str, str]]:
    """How OpenVINO carries out the encoder's nodes, such as `brgemm_avx512_i8`."""
    model = session.backend._graphs["encoder"].model.get_runtime_model()
    return [{"type": str(op.get_rt_info()["primitiveType"].value)} for op in model.get_ops()]


# What it refuses


def test_what_is_no_graph(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    content = (copy / "decoder.onnx").read_bytes()
    (copy / "decoder.onnx").write_bytes(content[: len(content) // 2])
    accept_changes(copy)
    with pytest.raises(BundleError, match=r"decoder.onnx is not a graph OpenVINO can load: \w"):
        load(copy, backend="openvino")


def test_a_graph_that_is_not_the_contracts(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3])
        for name in ("image", "image_embeddings")
    ]
    nodes = [helper.make_node("Identity", ["image"], ["image_embeddings"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", tensors[:1], tensors[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, copy / "encoder.onnx")
    accept_changes(copy)
    with pytest.raises(BundleError) as caught:
        load(copy, backend="openvino")
    assert "is not the graph its manifest describes: image is float32 (*, 3), the manifest " in (
        str(caught.value)
    )


def test_what_fails_while_running(bundle: Path) -> None:
    with load(bundle, backend="openvino") as session:
        with pytest.raises(DeviceError, match=r"OpenVINO failed: .*100"):
            session.backend.encode(np.zeros((1, 3, 100, 100), np.float32))
        image = np.zeros((1, 3, 256, 256), np.float32)
        assert session.backend.encode(image).shape == (1, 256, 16, 16), "and then goes on"


def test_the_default_is_onnxruntime(bundle: Path) -> None:
    with load(bundle) as session:
        assert session.backend.name == "onnxruntime"
    with pytest.raises(UsageError, match="there are: onnxruntime, openvino, "):
        load(bundle, backend="cuda")


def test_without_the_library(bundle: Path) -> None:
    done = start("verify", bundle, "--backend", "openvino", without=("openvino",))
    assert done.code == 2
    assert done.error == (
        "the backend openvino needs openvino, which is not installed: "
        "pip install 'medsa-deploy[openvino]'"
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_nothing_is_reported_to_anyone(backend: str, bundle: Path, tmp_path: Path) -> None:
    """The libraries' telemetry would connect, and write into the home folder."""
    code = """
import json, os, socket, sys

def refused(self, *address):
    raise AssertionError(address)

socket.socket.connect = refused
from medsa_deploy import load
with load(sys.argv[1], backend=sys.argv[2]):
    pass
print(json.dumps([sorted(sys.modules), os.listdir(os.environ["HOME"])]))
"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=("torch", "onnx")) + code, bundle, backend],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    modules, home = json.loads(done.stdout)
    assert home == []
    assert backend in modules
    assert "openvino_telemetry" not in modules
