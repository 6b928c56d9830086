"""Encoders that are made for one backend: the same function, and what each runs best."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import accept_changes, call, copied
from golden_cases import relative_l2
from invented import rows, vit_keys, weights

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest, save_manifest
from medsa_deploy.errors import BundleError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.evaluation.parity import RELATIVE_L2_LIMIT
from medsa_deploy.graph.token_loops import MOST_TOKENS
from medsa_deploy.runtime.backends.onnxruntime_cpu import read_layers
from medsa_deploy.runtime.backends.registry import BACKENDS, LoadOptions

SIZE, TOKENS = 512, 1024
"""The smallest image whose tokens, 32×32, are enough."""
NAME = "encoder.onnxruntime.onnx"
OURS, THEIRS = (BACKENDS[name].encoder_role for name in ("onnxruntime", "openvino"))


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
    return seeded_image(SIZE, 5)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in nodes(onnx.load(path, load_external_data=False).graph)]


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those in the steps of loops, too."""
    inner = [nodes(attribute.g) for node in graph.node for attribute in node.attribute]
    return [*graph.node, *itertools.chain.from_iterable(inner)]


def profile(path: Path, image: np.ndarray, folder: Path, *, runs: int = 1) -> Path:
    """Encode with ONNX Runtime alone → the file of its profiler."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / path.stem)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    prepared = np.moveaxis(image, -1, 0)[None].astype(np.float32)
    for _ in range(runs):
        session.run(None, {"image": prepared})
    return Path(session.end_profiling())


def values(path: Path, image: np.ndarray, folder: Path) -> list[tuple[str, int]]:
    """Kernel and elements of each value that an encoder makes."""
    return [
        (event["name"], int(np.prod(shape)))
        for event in json.loads(profile(path, image, folder).read_text())
        for typed in event["args"].get("output_type_shape", ())
        for shape in typed.values()
    ]


def encoded(bundle: Path, image: np.ndarray, **options: object) -> np.ndarray:
    portable = LoadOptions(portable=bool(options.pop("portable", False)))
    with load(bundle, threads=2, options=portable, **options) as session:
        return session.encode(image).values


def test_the_bundle_holds_an_encoder_of_onnx_runtimes_own(bundle: Path) -> None:
    made = load_manifest(bundle)
    assert made.file(OURS).path == NAME
    assert operators(bundle / NAME).count("MultiHeadAttention") == 1
    assert "MultiHeadAttention" not in operators(bundle / "encoder.onnx")
    assert operators(bundle / NAME).count("Softmax") == 1  # that of windows
    (parity,) = made.parity
    assert set(parity.encoders) == {OURS, THEIRS}
    for other in parity.encoders.values():
        assert other.tensors["image_embeddings"].relative_l2 < RELATIVE_L2_LIMIT


@pytest.mark.parametrize("rel_pos", [0.0, 1.0])
def test_it_stores_no_scores(export, image: np.ndarray, tmp_path: Path, rel_pos: float) -> None:
    """Two heads' scores of 1024 tokens are the largest value of the other."""
    bundle = export(f"scores{rel_pos}", head_size=20, rel_pos=rel_pos)
    portable, own = (values(bundle / name, image, tmp_path) for name in ("encoder.onnx", NAME))
    assert max(size for _, size in portable) == 2 * TOKENS**2
    assert max(size for _, size in own) < TOKENS**2


def test_linear_layers_take_some_tokens_at_a_time(
    bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    """All but those of windows, whose grids are small."""
    portable, own = (values(bundle / name, image, tmp_path) for name in ("encoder.onnx", NAME))
    hidden = [max(size for name, size in one if "mlp" in name) for one in (portable, own)]
    assert hidden[0] == hidden[1] * TOKENS / MOST_TOKENS
    graph = onnx.load(bundle / NAME, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    left = [node.name for node in graph.node if weights.intersection(node.input[1:2])]
    assert not [name for name in left if "MatMul" in name]


def test_layers_in_loops_are_timed_by_name(bundle: Path, image: np.ndarray, tmp_path: Path) -> None:
    """A kernel has one time for an encoding, however often it ran; together they are all of it."""
    path = profile(bundle / NAME, image, tmp_path, runs=3)
    found = read_layers(path)
    assert {len(layer.samples_ms) for layer in found} == {3}
    assert sum("mlp" in layer.name for layer in found) >= 4
    kernels = [e for e in json.loads(path.read_text()) if e["name"].endswith("_kernel_time")]
    loops = [e for e in kernels if e["args"]["op_name"] == "Scan"]
    whole = [
        e["dur"]
        for e in kernels
        if not any(
            one["ts"] <= e["ts"] and e["ts"] + e["dur"] <= one["ts"] + one["dur"]
            for one in loops
            if one is not e
        )
    ]
    assert sum(sum(layer.samples_ms) for layer in found) == pytest.approx(sum(whole) / 1e3)


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
    name = load_manifest(bundle).file(THEIRS).path
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
    assert not load_manifest(export("none")).has(THEIRS)


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


@pytest.mark.parametrize("head_size", [16, pytest.param(20, marks=pytest.mark.slow)])
def test_zero_tables_and_other_head_sizes(export, image: np.ndarray, head_size: int) -> None:
    made = export(f"zero{head_size}", head_size=head_size)
    assert operators(made / NAME).count("MultiHeadAttention") == 1
    graph = onnx.load(made / NAME, load_external_data=False).graph
    assert "MultiHeadAttention" in [node.op_type for node in graph.node]  # in no loop
    assert relative_l2(encoded(made, image), encoded(made, image, portable=True)) < 1e-5


def test_in_3d(export, image: np.ndarray) -> None:
    made = export("deep", "--depth-chunk", 2, rel_pos=1.0)
    assert "MultiHeadAttention" in operators(made / NAME)
    found = []
    for portable in (True, False):
        with load(made, threads=2, options=LoadOptions(portable=portable)) as session:
            slices = session.encode_slices([image, image[::-1].copy()])
            found.append(np.concatenate([one.values for one in slices]))
    assert relative_l2(found[1], found[0]) < 1e-5


def test_int8_for_processors_has_one_too(bundle: Path, tmp_path: Path, image: np.ndarray) -> None:
    from PIL import Image

    copy, images = copied(bundle, tmp_path), tmp_path / "images"
    images.mkdir()
    for seed in range(3):
        Image.fromarray(seeded_image(64, seed)).save(images / f"{seed}.png")
    done = call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu")
    assert done.code == 0, done.error
    name = load_manifest(copy).file(OURS, "int8-cpu").path
    assert {"MultiHeadAttention", "QuantizeLinear"} <= set(operators(copy / name))
    with load(copy, precision="int8-cpu", threads=2) as session:
        found = session.encode(image).values
    assert relative_l2(found, encoded(copy, image)) < 0.2
    assert call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu").code == 0


def test_an_older_bundle_is_quantized(bundle: Path, tmp_path: Path) -> None:
    """One that was exported before there were encoders of a backend's own."""
    from PIL import Image

    copy, images = copied(bundle, tmp_path), tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(seeded_image(64, seed)).save(images / f"{seed}.png")
    made = load_manifest(copy)
    for file in made.files:
        if file.role in (OURS, THEIRS):
            (copy / file.path).unlink()
    kept = tuple(file for file in made.files if file.role not in (OURS, THEIRS))
    save_manifest(replace(made, files=kept), copy)
    done = call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu")
    assert done.code == 0, done.error
    assert load_manifest(copy).has(OURS, "int8-cpu")
    assert call("verify", copy).code == 0


def test_small_grids_have_none(bundle_of) -> None:
    made = bundle_of("medsa_hyp_2d")
    assert not load_manifest(made).has(OURS)
    assert not (made / NAME).exists()


def doubled(path: Path) -> None:
    """Have attention take another scale than its own."""
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in nodes(model.graph) if node.op_type == "MultiHeadAttention")
    (scale,) = (attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f = 2.0
    path.write_bytes(model.SerializeToString())
