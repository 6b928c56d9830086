"""INT8 graphs: scales and codes, where Q/DQ stands, and the ranges of a user's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import onnxruntime as ort
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.evaluation.cases import seeded_case, seeded_image
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.float16 import to_float16
from medsa_deploy.graph.float32_nodes import float32_nodes, value_types
from medsa_deploy.graph.qdq import (
    LEVELS,
    SMALLEST_SCALE,
    activation_codes,
    linear_layers,
    quantize_layers,
    weight_codes,
)
from medsa_deploy.stages.quantize import calibration
from medsa_deploy.stages.quantize.calibration import Histogram, ImageSource
from medsa_deploy.stages.quantize.candidates import CandidateRunner

FINITE = st.floats(-1000, 1000, width=32)


# Scales and codes


@given(low=FINITE, high=FINITE)
def test_symmetric_activations(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero = activation_codes(low, high, unsigned=False)
    assert scale == np.float16(scale), "float16 graphs keep it exactly"
    assert (zero.dtype, zero.item()) == (np.int8, 0)
    assert scale * LEVELS >= max(-low, high), "nothing in the range saturates"
    assert scale <= max(-low, high, LEVELS * SMALLEST_SCALE) / LEVELS * 1.002 + SMALLEST_SCALE


@given(low=FINITE, high=FINITE)
def test_unsigned_activations(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero = activation_codes(low, high, unsigned=True)
    assert zero.dtype == np.uint8
    for value in (low, high, 0.0):
        code = np.clip(round(value / float(scale)) + int(zero), 0, 255)
        assert abs((code - int(zero)) * float(scale) - value) <= float(scale) * 1.001


@given(
    weights=arrays.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32)),
    axis=st.sampled_from([0, 1]),
    rounded=st.booleans(),
)
def test_weights_by_channel(weights: np.ndarray, axis: int, rounded: bool) -> None:
    codes, scales = weight_codes(weights, axis, rounded=rounded)
    assert scales.shape == (weights.shape[axis],)
    assert np.abs(codes.astype(int)).max() <= LEVELS
    spread = scales[None] if axis == 1 else scales[:, None]
    assert (np.abs(codes * spread - weights) <= spread / 2 * 1.001).all()
    if rounded:
        np.testing.assert_array_equal(scales, scales.astype(np.float16))


def linear(operator: str = "MatMul", **options: int) -> tuple[Any, np.ndarray]:
    """A graph of one linear layer and a bias, and its weights."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(16, 8)).astype(np.float32)
    stored = weights.T.copy() if options.get("transB") else weights
    tensors = {"w": stored, "b": rng.normal(size=8).astype(np.float32)}
    if operator == "MatMul":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["v"], name="m")]
        nodes.append(helper.make_node("Add", ["v", "b"], ["y"], name="a"))
    else:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="m", **options)]
    graph_proto = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 8])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph_proto, opset_imports=opsets, ir_version=10), weights


def run(model: Any, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_same_as_onnxruntimes_own_quantiser(tmp_path: Path, unsigned: bool) -> None:
    x = np.random.default_rng(5).normal(size=(200, 16)).astype(np.float32)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": x}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    model, _ = linear()
    onnx.save(model, tmp_path / "model.onnx")
    quantize_static(
        tmp_path / "model.onnx",
        tmp_path / "theirs.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": not unsigned,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    theirs = onnx.load(tmp_path / "theirs.onnx")
    layers = linear_layers(model)
    ranges = {"x": (float(x.min()), float(x.max()))}
    assert quantize_layers(model, layers, ranges, unsigned=unsigned).changed
    values = {t.name: numpy_helper.to_array(t) for t in theirs.graph.initializer}
    ours = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    tolerance = 1e-6 if unsigned else 1e-3  # ours are rounded up to float16 for TensorRT
    np.testing.assert_allclose(ours["x_scale"], values["x_scale"], rtol=tolerance)
    np.testing.assert_allclose(ours["w_scale"], values["w_scale"], rtol=tolerance)
    assert np.abs(ours["w_codes"].astype(int) - values["w_quantized"]).max() <= (not unsigned)
    assert {n.op_type for n in model.graph.node} == {n.op_type for n in theirs.graph.node}
    np.testing.assert_allclose(run(model, x), run(theirs, x), atol=0.1)


@pytest.mark.parametrize(
    ("operator", "options"),
    [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})],
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_quantized_layer(operator: str, options: dict[str, int], unsigned: bool) -> None:
    model, weights = linear(operator, **options)
    x = np.random.default_rng(6).normal(size=(50, 16)).astype(np.float32)
    expected = run(model, x)
    quantize_layers(model, linear_layers(model), {"x": (x.min(), x.max())}, unsigned=unsigned)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert stored["w_codes"].dtype == np.int8
    assert "w" not in stored
    assert stored["b"].dtype == np.float32, "TensorRT refuses a dequantized bias"
    assert len(stored["w_scale"]) == weights.shape[1]
    assert np.linalg.norm(run(model, x) - expected) <= 0.02 * np.linalg.norm(expected)


def test_no_layer_no_change() -> None:
    model, _ = linear()
    change = quantize_layers(model, [], {}, unsigned=False)
    assert (change.changed, change.description) == (False, "no linear layer is left to quantize")


def test_an_encoder_keeps_all_but_its_linear_layers(bundle: Path) -> None:
    """Attention products, convolutions and norms are left; queries, keys and values share Q/DQ."""
    model = load_graph(bundle / "encoder.onnx")
    layers = linear_layers(model)
    kinds = {layer.kind for layer in layers}
    assert {"attention.query", "attention.key", "attention.value", "mlp.0", "mlp.2"} <= kinds
    assert len({layer.name for layer in layers}) == len(layers)
    ranges = {layer.input: (-4.0, 4.0) for layer in layers}
    quantize_layers(model, layers, ranges, unsigned=False)
    to_float16(model, float32_nodes(model))
    onnx.checker.check_model(model, full_check=True)
    types = value_types(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len({layer.input for layer in layers}) < len(layers)
    assert all(types[node.input[1]] == TensorProto.FLOAT16 for node in quantizers)
    fed = 0
    for node in model.graph.node:
        from_codes = [makers[n].op_type == "DequantizeLinear" for n in node.input if n in makers]
        if any(from_codes):
            assert node.op_type == "MatMul"
            assert from_codes == [True, True]
            fed += 1
    assert fed == len(layers)


# Ranges


@given(
    samples=st.lists(
        arrays.arrays(np.float32, st.integers(1, 50), elements=FINITE), min_size=1, max_size=4
    ),
    percent=st.sampled_from([50.0, 90.0, 99.9]),
)
def test_percentiles_of_a_growing_histogram(samples: list[np.ndarray], percent: float) -> None:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    values = np.abs(np.concatenate(samples))
    assert histogram.counts.sum() == len(values)
    assert values.max() <= histogram.top <= max(2 * values.max(), calibration.LEAST_TOP)
    bin_width = histogram.top / len(histogram.counts)
    exact = np.quantile(values, percent / 100, method="inverted_cdf")
    assert exact * (1 - 1e-6) <= histogram.percentile(percent) <= (exact + bin_width) * (1 + 1e-6)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        PIL.Image.fromarray(seeded_image(64, i)).save(folder / f"{i}.png")
    return folder


def trials(bundle: Path) -> CandidateRunner:
    manifest = load_manifest(bundle)
    return CandidateRunner(
        bundle, manifest, [seeded_case(manifest.network.image_size, 64, 1)], None
    )


def inputs_of(bundle: Path) -> set[str]:
    return {layer.input for layer in linear_layers(load_graph(bundle / "encoder.onnx"))}


def test_ranges_are_those_of_the_images(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the values themselves; and what was interrupted goes on where it was saved."""
    monkeypatch.setattr(calibration.tempfile, "gettempdir", lambda: str(tmp_path))
    name = min(inputs_of(bundle))
    sources = calibration.find_sources([images])
    assert [source.name for source in sources] == [f"{i}.png" for i in range(10)]
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.measure(trials(bundle), tmp_path, sources, {name}, stop)
    assert seen == [(i, 10) for i in range(10)]
    seen.clear()
    measured = calibration.measure(
        trials(bundle), tmp_path, sources, {name}, lambda *count: seen.append(count)
    )
    assert seen == [(8, 10), (9, 10), (10, 10)]

    model = load_graph(bundle / "encoder.onnx")
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    path = save_graph(model, tmp_path / "open.onnx")[0]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = []
    with load(bundle) as plain:
        for source in sources:
            grabbed: list[np.ndarray] = []
            encode = plain.backend.encode
            plain.backend.encode = lambda x, g=grabbed, e=encode: (g.append(x), e(x))[1]
            plain.encode(calibration.read_image(source.path))
            plain.backend.encode = encode
            values.append(session.run([name], {"image": grabbed[0]})[0].ravel())
    every = np.concatenate(values)
    low, high = measured.ranges(None)[name]
    assert (low, high) == (pytest.approx(every.min()), pytest.approx(every.max()))
    top = np.quantile(np.abs(every), 0.999)
    low, high = measured.ranges(99.9)[name]
    assert max(-low, high) == pytest.approx(top, rel=0.03)


def test_other_images_are_measured_anew(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration.tempfile, "gettempdir", lambda: str(tmp_path))
    seen: list[int] = []
    for count in (1, 1, 2):
        sources = [ImageSource(path=images / f"{i}.png") for i in range(count)]
        calibration.measure(
            trials(bundle),
            tmp_path,
            sources,
            {min(inputs_of(bundle))},
            lambda done, total: seen.append(done),
        )
    assert seen == [0, 1, 1, 0, 1, 2]


def test_a_volume_gives_slices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voxels = np.random.default_rng(1).integers(0, 900, (20, 24, 40)).astype(np.int16)
    voxels[:, :, 30:] = 7
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "volume.nii.gz")
    sources = calibration.find_sources([tmp_path / "volume.nii.gz"])
    slices = [source.index for source in sources]
    assert slices == [i for i in np.linspace(0, 39, 16).round().astype(int) if i < 30]
    assert sources[1].name == "volume.nii.gz 3"
    assert "32 or more" in caplog.text


def test_a_volume_gives_chunks(tmp_path: Path) -> None:
    voxels = np.random.default_rng(1).integers(0, 900, (20, 24, 40)).astype(np.int16)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    assert [s.index for s in calibration.find_sources([path], 4)] == [0, 12, 24, 36]
    assert [s.index for s in calibration.find_sources([path], 40)] == [0]
    with pytest.raises(ImageError, match="has 40 slices; this network sees 41 at a time"):
        calibration.find_sources([path], 41)


def test_some_images_are_kept_to_judge_by() -> None:
    sources = [ImageSource(path=Path(f"{i}.png")) for i in range(32)]
    used, judged = calibration.hold_out(sources)
    assert [int(source.path.stem) for source in judged] == [6, 12, 19, 25]
    assert sorted([*used, *judged], key=sources.index) == sources
    used, judged = calibration.hold_out(sources[:7])
    assert (used, judged) == (sources[:7], sources[:4])


def test_what_cannot_be_calibrated_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --calibration"):
        calibration.find_sources([])
    with pytest.raises(ImageError, match="holds no images"):
        calibration.find_sources([tmp_path])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    with pytest.raises(ImageError, match=r"a\.png cannot be read"):
        calibration.find_sources([tmp_path])
