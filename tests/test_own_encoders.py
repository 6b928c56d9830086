"""Encoders that are made for one backend: the same function, and what each runs best."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
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
from medsa_deploy.bundle.manifest import Role, load_manifest, save_manifest
from medsa_deploy.errors import BundleError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.evaluation.parity import RELATIVE_L2_LIMIT
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import contract, export_encoder
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.graph.backend_encoders import write_backend_encoders
from medsa_deploy.graph.token_loops import MOST_TOKENS
from medsa_deploy.runtime.backends.onnxruntime_cpu import read_layers
from medsa_deploy.runtime.backends.registry import BACKENDS, LoadOptions

SIZE, TOKENS = 512, 1024
"""The smallest image whose tokens, 32×32, are enough."""
NAME = "encoder.onnxruntime.onnx"
OURS, THEIRS = (BACKENDS[name].encoder_role for name in ("onnxruntime", "openvino"))


def checkpoint(path: Path, *, head_size: int, rel_pos: float, deep: bool = False) -> Path:
    """A ViT of one block with windows and one without."""
    adapters = {"Space": (0, 1), "MLP": (0, 1)} | ({"Depth": (0, 1)} if deep else {})
    keys = vit_keys(
        width=2 * head_size, head_size=head_size, tables=rows(2, 14, 32, {1}), adapters=adapters
    )
    torch.save(weights(keys, rel_pos=rel_pos), path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle, with relative positions."""
    path = checkpoint(tmp_path_factory.mktemp("real") / "c.pth", head_size=20, rel_pos=1.0)
    done = call("export", path, "--image-size", SIZE)
    assert done.code == 0, done.error
    return path.with_suffix(".medsa")


def encoders(folder: Path, *, head_size: int, rel_pos: float, chunk: int = 1) -> dict[Role, Path]:
    """The encoders of a bundle, without the rest of it; the portable one is `encoder`."""
    deep = chunk > 1
    loaded = load_checkpoint(
        checkpoint(folder / "c.pth", head_size=head_size, rel_pos=rel_pos, deep=deep)
    )
    overrides = Overrides(image_size=SIZE, depth_chunk=chunk if deep else None)
    network = infer(loaded, overrides).network
    encoder = fold(build_reference(network, loaded.tensors)).encoder
    graph = contract(network)["encoder"]
    files = export_encoder(encoder, graph, folder / "encoder.onnx", chunk=chunk)
    return {"encoder": files[0], **write_backend_encoders(files)}


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
    manifest = load_manifest(bundle)
    assert manifest.file(OURS).path == NAME
    assert operators(bundle / NAME).count("MultiHeadAttention") == 1
    assert "MultiHeadAttention" not in operators(bundle / "encoder.onnx")
    assert operators(bundle / NAME).count("Softmax") == 1  # that of windows
    (parity,) = manifest.parity
    assert set(parity.encoders) == {OURS, THEIRS}
    for other in parity.encoders.values():
        assert other.tensors["image_embeddings"].relative_l2 < RELATIVE_L2_LIMIT


@pytest.mark.parametrize("rel_pos", [0.0, 1.0])
def test_it_stores_no_scores(
    bundle: Path, image: np.ndarray, tmp_path: Path, rel_pos: float
) -> None:
    """Two heads' scores of 1024 tokens are the largest value of the other."""
    paths = {"encoder": bundle / "encoder.onnx", OURS: bundle / NAME}
    if not rel_pos:
        paths = encoders(tmp_path, head_size=20, rel_pos=0.0)
    portable, ours = (values(paths[role], image, tmp_path) for role in ("encoder", OURS))
    assert max(size for _, size in portable) == 2 * TOKENS**2
    assert max(size for _, size in ours) < TOKENS**2


def test_linear_layers_take_some_tokens_at_a_time(
    bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    """All but those of windows, whose grids are small."""
    portable, ours = (values(bundle / name, image, tmp_path) for name in ("encoder.onnx", NAME))
    hidden = [max(size for name, size in sizes if "mlp" in name) for sizes in (portable, ours)]
    assert hidden[0] == hidden[1] * TOKENS / MOST_TOKENS
    graph = onnx.load(bundle / NAME, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    left = [node.name for node in graph.node if weights.intersection(node.input[1:2])]
    assert not [name for name in left if "MatMul" in name]


def test_layers_in_loops_are_timed_by_name(bundle: Path, image: np.ndarray, tmp_path: Path) -> None:
    """A kernel has one time for an encoding, however often it ran; together they are all of it."""
    path = profile(bundle / NAME, image, tmp_path, runs=3)
    layers = read_layers(path)
    assert {len(layer.samples_ms) for layer in layers} == {3}
    assert sum("mlp" in layer.name for layer in layers) >= 4
    kernels = [e for e in json.loads(path.read_text()) if e["name"].endswith("_kernel_time")]
    loops = [e for e in kernels if e["args"]["op_name"] == "Scan"]
    durations = [
        e["dur"]
        for e in kernels
        if not any(
            loop["ts"] <= e["ts"] and e["ts"] + e["dur"] <= loop["ts"] + loop["dur"]
            for loop in loops
            if loop is not e
        )
    ]
    assert sum(sum(layer.samples_ms) for layer in layers) == pytest.approx(sum(durations) / 1e3)


def test_it_shares_the_weights(bundle: Path) -> None:
    model = onnx.load(bundle / NAME, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.external_data[0].value for tensor in outside} == {"encoder.onnx"}
    assert (bundle / NAME).stat().st_size < 0.5 * (bundle / "encoder.onnx").stat().st_size


def test_the_session_runs_it(bundle: Path, image: np.ndarray, tmp_path: Path) -> None:
    expected = encoded(bundle, image, portable=True)
    assert relative_l2(encoded(bundle, image), expected) < 1e-5
    copy = copied(bundle, tmp_path)
    doubled(copy / NAME)
    accept_changes(copy)
    assert relative_l2(encoded(copy, image), expected) > 1e-3
    assert np.array_equal(encoded(copy, image, portable=True), expected)
    assert relative_l2(encoded(copy, image, backend="openvino"), expected) < 1e-5  # not this one


def test_openvino_has_one_for_relative_positions(
    bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    """Its products are of the heads' own width, and the positions are added."""
    name = load_manifest(bundle).file(THEIRS).path
    assert operators(bundle / name).count("Expand") == 1  # that of windows
    assert operators(bundle / "encoder.onnx").count("Expand") == 2
    expected = encoded(bundle, image, portable=True)
    assert relative_l2(encoded(bundle, image, backend="openvino"), expected) < 1e-5
    assert relative_l2(encoded(bundle, image, backend="openvino", portable=True), expected) < 1e-5
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


def run(path: Path, images: Sequence[np.ndarray]) -> np.ndarray:
    """Embeddings of images in the network's own size."""
    prepared = np.stack([np.moveaxis(image, -1, 0) for image in images]).astype(np.float32)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"image": prepared / 255})
    return embeddings


@pytest.mark.parametrize("head_size", [16, 20])
def test_zero_tables_and_other_head_sizes(
    image: np.ndarray, tmp_path: Path, head_size: int
) -> None:
    paths = encoders(tmp_path, head_size=head_size, rel_pos=0.0)
    assert THEIRS not in paths, "without relative positions, OpenVINO has none of its own"
    assert operators(paths[OURS]).count("MultiHeadAttention") == 1
    graph = onnx.load(paths[OURS], load_external_data=False).graph
    assert "MultiHeadAttention" in [node.op_type for node in graph.node]  # in no loop
    ours, portable = (run(paths[role], [image]) for role in (OURS, "encoder"))
    assert relative_l2(ours, portable) < 1e-5


def test_in_3d(image: np.ndarray, tmp_path: Path) -> None:
    paths = encoders(tmp_path, head_size=16, rel_pos=1.0, chunk=2)
    assert "MultiHeadAttention" in operators(paths[OURS])
    portable = run(paths["encoder"], [image, image[::-1]])
    for role in (OURS, THEIRS):
        assert relative_l2(run(paths[role], [image, image[::-1]]), portable) < 1e-5


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
        embeddings = session.encode(image).values
    assert relative_l2(embeddings, encoded(copy, image)) < 0.2
    assert call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu").code == 0


def test_an_older_bundle_is_quantized(bundle: Path, tmp_path: Path) -> None:
    """One that was exported before there were encoders of a backend's own."""
    from PIL import Image

    copy, images = copied(bundle, tmp_path), tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(seeded_image(64, seed)).save(images / f"{seed}.png")
    manifest = load_manifest(copy)
    for file in manifest.files:
        if file.role in (OURS, THEIRS):
            (copy / file.path).unlink()
    files = tuple(file for file in manifest.files if file.role not in (OURS, THEIRS))
    save_manifest(replace(manifest, files=files), copy)
    done = call("quantize", copy, "--int8", "--calibration", images, "--for", "cpu")
    assert done.code == 0, done.error
    assert load_manifest(copy).has(OURS, "int8-cpu")
    assert call("verify", copy).code == 0


def test_small_grids_have_none(bundle_of) -> None:
    bundle = bundle_of("medsa_hyp_2d")
    assert not load_manifest(bundle).has(OURS)
    assert not (bundle / NAME).exists()


def doubled(path: Path) -> None:
    """Have attention take another scale than its own."""
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in nodes(model.graph) if node.op_type == "MultiHeadAttention")
    (scale,) = (attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f = 2.0
    path.write_bytes(model.SerializeToString())
