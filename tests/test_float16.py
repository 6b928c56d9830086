"""Float16 graphs: which nodes stay float32, and what the conversion makes of every kind of node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from medsa_deploy.bundle.node_names import METADATA, block_of, kind_of, module_of
from medsa_deploy.errors import BundleError
from medsa_deploy.graph import files
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.float16 import round_like_float16, to_float16
from medsa_deploy.graph.float32_nodes import OPERATORS, float32_nodes, value_types
from medsa_deploy.graph.ranges import HIGH, LOW, SAMPLE, SAMPLE_STRIDE, computed_values, watch

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
SIDE = 4


def graph(
    nodes: Sequence[Any], *, shape: Sequence[int | str] = ("B", SIDE, SIDE), **constants: Any
) -> Any:
    """A model from `x` to `y`, both float32."""
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    ends = [helper.make_tensor_value_info(name, FLOAT, shape) for name in "xy"]
    graph_proto = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(
        graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


def node(operator: str, inputs: str, output: str, module: str = "", **options: Any) -> Any:
    node_proto = helper.make_node(operator, inputs.split(), [output], name=output, **options)
    scopes = repr(["", module, output])
    node_proto.metadata_props.add(key=METADATA, value=scopes)
    return node_proto


def run(model: Any, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def converted(model: Any, **options: Any) -> Any:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    assert to_float16(copy, float32_nodes(copy, **options)).changed
    return copy


def kinds(model: Any) -> dict[str, int]:
    """The type of each node's first output."""
    types = value_types(model)
    return {node.name: types[node.output[0]] for node in model.graph.node}


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, SIDE, SIDE)).astype(np.float32)


# Which nodes stay float32


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_norms_and_softmax_compute_in_float32_and_the_rest_does_not(
    bundle: Path, name: str
) -> None:
    model = load_graph(bundle / f"{name}.onnx")
    change = to_float16(model, float32_nodes(model))
    assert change.changed
    onnx.checker.check_model(model, full_check=True)
    types = value_types(model)
    for tensor in (*model.graph.input, *model.graph.output):
        assert tensor.type.tensor_type.elem_type == FLOAT
    for node in model.graph.node:
        read_types = {types[value] for value in node.input if types.get(value) in (FLOAT, HALF)}
        if node.op_type in OPERATORS:
            assert read_types == {FLOAT}, node.name
        elif node.op_type in ("MatMul", "Gemm", "Conv", "Gelu", "Relu") and "sparse" not in (
            module_of(node)
        ):
            assert read_types == {HALF}, node.name


def test_coordinates_stay_float32_up_to_their_sines(bundle: Path) -> None:
    model = load_graph(bundle / "decoder.onnx")
    to_float16(model, float32_nodes(model))
    types = value_types(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    todo = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    assert len(todo) == 2
    seen = set()
    while todo:
        node = todo.pop()
        for name in node.input:
            if types.get(name) in (FLOAT, HALF):
                assert types[name] == FLOAT, name
                seen.add(name)
            if name in makers and types.get(name) in (FLOAT, HALF):
                todo.append(makers[name])
    assert "point_coords" in seen


def test_why_nodes_stay(bundle: Path) -> None:
    model = load_graph(bundle / "decoder.onnx")
    reasons = float32_nodes(model)
    names = {model.graph.node[i].op_type: reason for i, reason in reasons.items()}
    assert names["LayerNormalization"] == "norms"
    assert names["Softmax"] == "softmax"
    assert names["Sin"] == "coordinates"


def test_a_block_returns_to_float32(bundle: Path) -> None:
    model = load_graph(bundle / "encoder.onnx")
    of_block = float32_nodes(model, blocks=["blocks.1"])
    for i, node in enumerate(model.graph.node):
        if block_of(module_of(node)) == "blocks.1" and node.op_type in ("MatMul", "Gelu"):
            assert of_block[i] == "blocks"
    to_float16(model, of_block)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e9, "constants beyond float16"), (-1e9, "constants beyond float16"), (-np.inf, None)],
)
def test_constants_that_float16_cannot_hold(value: float, reason: str | None) -> None:
    """A mask of −1e9 stays float32; −∞ is −∞ in float16."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[0, 1] = value
    nodes = [node("Relu", "x", "a"), node("Add", "a mask", "sum"), node("Softmax", "sum", "y")]
    model = graph(nodes, mask=mask)
    assert float32_nodes(model).get(1) == reason
    expected = run(model, inputs())
    np.testing.assert_allclose(run(converted(model), inputs()), expected, atol=2e-3)


def test_values_measured_near_the_limit_stay_float32() -> None:
    model = graph(
        [node("Mul", "x k", "large"), node("Mul", "large r", "y")],
        k=np.float32(30000),
        r=np.float32(1 / 30000),
    )
    for hot, reasons in (({}, {}), ({"large": 16000.0}, {}), ({"large": 20000.0}, {0, 1})):
        assert set(float32_nodes(model, ranges=hot)) == set(reasons)
    rounded = onnx.ModelProto.FromString(model.SerializeToString())
    round_like_float16(rounded, {})
    assert not np.isfinite(run(rounded, 3 * inputs())).all(), "float16 overflows here"
    np.testing.assert_allclose(run(model, 3 * inputs()), 3 * inputs(), rtol=1e-5)


# What the conversion does


def test_a_value_that_both_types_read_is_cast_once() -> None:
    model = graph(
        [
            node("Relu", "x", "a"),
            node("Softmax", "a", "b"),
            node("Softmax", "a", "c", axis=1),
            node("Add", "b c", "d"),
            node("Add", "d a", "y"),
        ]
    )
    half = converted(model)
    casts = [cast.input[0] for cast in half.graph.node if cast.op_type == "Cast"]
    assert sorted(casts) == ["a", "b", "c", "x", "y_float16"]
    np.testing.assert_allclose(run(half, inputs()), run(model, inputs()), atol=5e-3)


def test_a_weight_that_both_types_read_is_kept_in_both() -> None:
    weight = np.linspace(-1, 1, SIDE).astype(np.float32) / 3
    bias = np.zeros(SIDE, np.float32)
    model = graph(
        [node("Mul", "x w", "a"), node("LayerNormalization", "a w b", "y")], w=weight, b=bias
    )
    half = converted(model)
    dtypes = {t.name: t.data_type for t in half.graph.initializer}
    assert dtypes == {"w": FLOAT, "b": FLOAT, "w_float16": HALF}
    np.testing.assert_allclose(run(half, inputs()), run(model, inputs()), atol=5e-3)


@pytest.mark.parametrize(
    "model",
    [
        graph(
            [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")],
            scales=np.ones(3, np.float32),
        ),
        graph(
            [
                node("Range", "zero four one", "r"),
                node("Add", "x r", "y"),
            ],
            zero=np.float32(0),
            four=np.float32(4),
            one=np.float32(1),
        ),
        graph(
            [node("Cast", "x", "i", to=TensorProto.INT64), node("Cast", "i", "y", to=FLOAT)]
        ),
        graph(
            [
                helper.make_node(
                    "Constant", [], ["k"], value=numpy_helper.from_array(np.float32(0.5))
                ),
                node("Mul", "x k", "y"),
            ]
        ),
        graph(
            [
                node("Shape", "x", "s"),
                node("ConstantOfShape", "s", "k", value=numpy_helper.from_array(np.ones(1, "f"))),
                node("Add", "x k", "y"),
            ]
        ),
        graph([node("ConstantOfShape", "s", "k"), node("Add", "x k", "y")], s=np.array([SIDE])),
        graph([node("Greater", "x k", "b"), node("Where", "b x k", "y")], k=np.float32(0.1)),
        graph([node("Pad", "x p k", "q"), node("Slice", "q s e a", "y")],
              p=np.array([0, 0, 0, 0, 0, 2]), k=np.float32(3), s=np.array([0]),
              e=np.array([SIDE]), a=np.array([2])),
    ],
    ids=lambda model: model.graph.node[0].op_type + str(len(model.graph.node)),
)  # fmt: skip
def test_operators_that_need_care(model: Any) -> None:
    half = onnx.ModelProto.FromString(model.SerializeToString())
    to_float16(half, float32_nodes(half))
    np.testing.assert_allclose(run(half, inputs()), run(model, inputs()), rtol=2e-3, atol=2e-3)


def test_why_a_graph_was_not_changed() -> None:
    softmax = graph([node("Softmax", "x", "y")])
    change = to_float16(softmax, float32_nodes(softmax))
    assert (change.changed, change.description) == (False, "every node is a float32 island")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", FLOAT, None)],
    )
    control = graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        c=np.array(True),
    )
    before = control.SerializeToString()
    change = to_float16(control, {})
    assert not change.changed
    assert "control flow" in change.description
    assert control.SerializeToString() == before


@given(
    operators=st.lists(
        st.sampled_from(["Relu", "Softmax", "Transpose", "Sigmoid", "Add", "Mul", "MatMul"]),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)
def test_any_chain_gives_what_float32_gives(operators: list[str], seed: int) -> None:
    """Whatever order of islands and float16: valid, typed, and near."""
    nodes, last = [], "x"
    for i, operator in enumerate(operators):
        name = "y" if i == len(operators) - 1 else f"v{i}"
        other = " w" if operator in ("Add", "Mul", "MatMul") else ""
        options = {"perm": [0, 2, 1]} if operator == "Transpose" else {}
        nodes.append(node(operator, last + other, name, **options))
        last = name
    weight = np.random.default_rng(seed).uniform(-0.5, 0.5, (SIDE, SIDE)).astype(np.float32)
    model = graph(nodes, w=weight)
    half = onnx.ModelProto.FromString(model.SerializeToString())
    to_float16(half, float32_nodes(half))
    rounded = onnx.ModelProto.FromString(model.SerializeToString())
    round_like_float16(rounded, float32_nodes(rounded))
    expected = run(model, inputs(seed))
    for results in (run(half, inputs(seed)), run(rounded, inputs(seed))):
        np.testing.assert_allclose(results, expected, atol=2e-2)


def test_rounding_is_that_of_float16() -> None:
    model = graph([node("Mul", "x k", "y")], k=np.float32(1 / 3))
    round_like_float16(model, {})
    third = np.float16(1 / 3).astype(np.float32)
    expected = (inputs() * third).astype(np.float16)
    np.testing.assert_array_equal(run(model, inputs()), expected.astype(np.float32))


# Ranges and files


def test_ranges_come_from_inside_the_graph() -> None:
    model = graph([node("Relu", "x", "a"), node("Transpose", "a", "b", perm=[0, 2, 1]),
                   node("Mul", "b k", "y")], k=np.float32(-2))  # fmt: skip
    assert computed_values(model) == ["a", "y"]
    watch(model, ["a"], sampled=["y"])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(names, {"x": inputs()}), strict=True))
    assert results[f"a{LOW}"] == 0
    assert results[f"a{HIGH}"] == inputs().max()
    assert results[f"y{LOW}"] == -2 * inputs().max()
    np.testing.assert_array_equal(results[f"y{SAMPLE}"], results["y"].ravel()[::SAMPLE_STRIDE])


@pytest.mark.parametrize(
    ("module", "block", "kind"),
    [
        ("blocks.3.attention.query", "blocks.3", "attention.query"),
        ("stages.7.mlp.0", "stages.7", "mlp.0"),
        ("neck.narrow", "neck", "narrow"),
        ("upscaling", "upscaling", "upscaling"),
        ("", "rest", "rest"),
    ],
)
def test_blocks_and_kinds(module: str, block: str, kind: str) -> None:
    assert (block_of(module), kind_of(module)) == (block, kind)


def test_a_large_graph_keeps_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graph([node("Mul", "x k", "y")], k=np.full((SIDE, SIDE), 2, np.float32))
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 10)
    written = save_graph(model, tmp_path / "encoder.fp16.onnx")
    assert [path.name for path in written] == ["encoder.fp16.onnx", "encoder.fp16.onnx.data"]
    np.testing.assert_array_equal(run(load_graph(written[0]), inputs()), 2 * inputs())


def test_what_is_saved_names_no_place_on_this_machine(bundle: Path, tmp_path: Path) -> None:
    """The exporter notes the stack of every node; a bundle travels without."""
    save_graph(load_graph(bundle / "encoder.onnx"), tmp_path / "encoder.onnx")
    assert str(Path(onnx.__file__).parents[1]).encode() not in (
        (tmp_path / "encoder.onnx").read_bytes()
    )


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        load_graph(tmp_path / "encoder.onnx")
