"""Encoders that are made for one backend: the same function, and what each runs best."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import accept_changes, call, copied
from golden_cases import relative_l2
from invented import rows, vit_keys, weights

from medsa_deploy import load, manifest, verify
from medsa_deploy.errors import BundleError
from medsa_deploy.runtime.loading import OWN_ENCODERS

SIZE, TOKENS = 512, 1024
"""The smallest image whose tokens, 32×32, are enough."""
NAME = "encoder.onnxruntime.onnx"
OURS, THEIRS = OWN_ENCODERS["onnxruntime"], OWN_ENCODERS["openvino"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory):
    """Export a ViT of one block with windows and one without → its bundle."""

    def made(name: str, *options: object, head_size: int = 16, rel_pos: float = 0.0) -> Path:
        adapters = {"Space": (0, 1), "MLP": (0, 1)} | ({"Depth": (0, 1)} if options else {})
        keys = vit_keys(
            width=2 * head_size, head_size=head_size, tables=rows(2, 14, 32, {1}), adapters=adapters
        )
        checkpoint = tmp_path_factory.mktemp(name) / "c.pth"
        torch.save(weights(keys, rel_pos=rel_pos), checkpoint)
        done = call("export", checkpoint, "--image-size", SIZE, *options)
        assert done.code == 0, done.error
        return checkpoint.with_suffix(".medsa")

    return made


@pytest.fixture(scope="module")
def bundle(export) -> Path:
    return export("real", head_size=20, rel_pos=1.0)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return verify.seeded_image(SIZE, 5)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in nodes(onnx.load(path, load_external_data=False).graph)]


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those in the steps of loops, too."""
    inner = [nodes(attribute.g) for node in graph.node for attribute in node.attribute]
    return [*graph.node, *itertools.chain.from_iterable(inner)]


def largest(path: Path, image: np.ndarray, folder: Path) -> int:
    """Elements of the largest value that a node of an encoder makes, as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / path.stem)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    prepared = np.moveaxis(image, -1, 0)[None].astype(np.float32)
    session.run(None, {"image": prepared})
    events = json.loads(Path(session.end_profiling()).read_text())
    made = [e["args"]["output_type_shape"] for e in events if "output_type_shape" in e["args"]]
    return max(int(np.prod(shape)) for one in made for typed in one for shape in typed.values())


def encoded(bundle: Path, image: np.ndarray, **options: object) -> np.ndarray:
    with load(bundle, threads=2, **options) as session:
        return session.encode(image).values


def test_the_bundle_holds_an_encoder_of_onnx_runtimes_own(bundle: Path) -> None:
    made = manifest.load(bundle)
    assert made.file(OURS).path == NAME
    assert operators(bundle / NAME).count("MultiHeadAttention") == 1
    assert "MultiHeadAttention" not in operators(bundle / "encoder.onnx")
    assert operators(bundle / NAME).count("Softmax") == 1  # that of windows
    (parity,) = made.parity
    assert set(parity.encoders) == {OURS, THEIRS}
    for other in parity.encoders.values():
        assert other.tensors["image_embeddings"].relative_l2 < verify.RELATIVE_L2_LIMIT


@pytest.mark.parametrize("rel_pos", [0.0, 1.0])
def test_it_stores_no_scores(export, image: np.ndarray, tmp_path: Path, rel_pos: float) -> None:
    """Two heads' scores of 1024 tokens are the largest value of the other."""
    bundle = export(f"scores{rel_pos}", head_size=20, rel_pos=rel_pos)
    assert largest(bundle / "encoder.onnx", image, tmp_path) == 2 * TOKENS**2
    assert largest(bundle / NAME, image, tmp_path) < TOKENS**2


def test_it_shares_the_weights(bundle: Path) -> None:
    model = onnx.load(bundle / NAME, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.external_data[0].value for tensor in outside} == {"encoder.onnx"}
    assert (bundle / NAME).stat().st_size < 0.5 * (bundle / "encoder.onnx").stat().st_size


def test_the_session_runs_it(bundle: Path, image: np.ndarray, tmp_path: Path) -> None:
    whole = encoded(bundle, image, portable=True)
    assert relative_l2(encoded(bundle, image), whole) < 1e-5
    copy = copied(bundle, tmp_path)
    doubled(copy / NAME)
    accept_changes(copy)
    assert relative_l2(encoded(copy, image), whole) > 1e-3
    assert np.array_equal(encoded(copy, image, portable=True), whole)
    assert relative_l2(encoded(copy, image, backend="openvino"), whole) < 1e-5  # not this one


def test_openvino_has_one_for_relative_positions(
    bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    """Its products are of the heads' own width, and the positions are added."""
    name = manifest.load(bundle).file(THEIRS).path
    assert operators(bundle / name).count("Expand") == 1  # that of windows
    assert operators(bundle / "encoder.onnx").count("Expand") == 2
    whole = encoded(bundle, image, portable=True)
    assert relative_l2(encoded(bundle, image, backend="openvino"), whole) < 1e-5
    assert relative_l2(encoded(bundle, image, backend="openvino", portable=True), whole) < 1e-5
    done = call("verify", bundle, "--backend", "openvino")
    assert done.code == 0, done.err
    assert "with encoder-openvino" in done.out
    copy = copied(bundle, tmp_path)
    model = onnx.load(copy / name, load_external_data=False)
    for node in model.graph.node:
        if node.name.endswith("/with_rows"):
            node.op_type = "Sub"
    (copy / name).write_bytes(model.SerializeToString())
    accept_changes(copy)
    assert call("verify", copy).code == 0  # ONNX Runtime does not run it
    done = call("verify", copy, "--backend", "openvino", "--json")
    assert done.code == 1
    assert all("encoder-openvino: " in failure for failure in done.json["failures"])


def test_without_relative_positions_openvino_has_none(export) -> None:
    assert not manifest.load(export("none")).has(THEIRS)


def test_a_damaged_one_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    doubled(copy / NAME)
    with pytest.raises(BundleError, match=NAME):
        load(copy)


def test_verify_judges_it(bundle: Path, tmp_path: Path) -> None:
    done = call("verify", bundle)
    assert done.code == 0, done.error
    assert "with encoder-onnxruntime" in done.out
    copy = copied(bundle, tmp_path)
    doubled(copy / NAME)
    accept_changes(copy)
    done = call("verify", copy, "--json")
    assert done.code == 1
    failures = json.loads(done.out)["failures"]
    assert failures
    assert all("encoder-onnxruntime: " in failure for failure in failures)


@pytest.mark.parametrize("head_size", [16, 20])
def test_zero_tables_and_other_head_sizes(export, image: np.ndarray, head_size: int) -> None:
    made = export(f"zero{head_size}", head_size=head_size)
    assert operators(made / NAME).count("MultiHeadAttention") == 1
    assert "Scan" not in operators(made / NAME)
    assert relative_l2(encoded(made, image), encoded(made, image, portable=True)) < 1e-5


def test_in_3d(export, image: np.ndarray) -> None:
    made = export("deep", "--depth-chunk", 2, rel_pos=1.0)
    assert "MultiHeadAttention" in operators(made / NAME)
    found = []
    for portable in (True, False):
        with load(made, threads=2, portable=portable) as session:
            slices = session.encode_slices([image, image[::-1].copy()])
            found.append(np.concatenate([one.values for one in slices]))
    assert relative_l2(found[1], found[0]) < 1e-5


def test_int8_for_processors_has_one_too(bundle: Path, tmp_path: Path, image: np.ndarray) -> None:
    from PIL import Image

    copy, images = copied(bundle, tmp_path), tmp_path / "images"
    images.mkdir()
    for seed in range(3):
        Image.fromarray(verify.seeded_image(64, seed)).save(images / f"{seed}.png")
    done = call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu")
    assert done.code == 0, done.error
    name = manifest.load(copy).file(OURS, "int8-cpu").path
    assert {"MultiHeadAttention", "QuantizeLinear"} <= set(operators(copy / name))
    with load(copy, precision="int8-cpu", threads=2) as session:
        found = session.encode(image).values
    assert relative_l2(found, encoded(copy, image)) < 0.2
    assert call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu").code == 0


def test_small_grids_have_none(bundle_of) -> None:
    made = bundle_of("medsa_hyp_2d")
    assert not manifest.load(made).has(OURS)
    assert not (made / NAME).exists()


def doubled(path: Path) -> None:
    """Have attention take another scale than its own."""
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in nodes(model.graph) if node.op_type == "MultiHeadAttention")
    (scale,) = (attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f = 2.0
    path.write_bytes(model.SerializeToString())
