"""Loops over some tokens at a time compute what the graph did, whatever lies between them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper

from medsa_deploy.graph.token_loops import loop_tokens

SIDE, WIDTH = 4, 6
STEPS = ("Add", "Gelu", "LayerNormalization", "MatMul", "bias", "halves", "mean", "swapped")


def graph_of(steps: list[tuple[str, int, int]], outputs: list[int], batch: int | str) -> bytes:
    """Values (batch, 4, 4, 6), each made by a step from two that came before it → a model."""
    rng = np.random.default_rng(0)
    nodes, tensors, values = [], [], ["x"]

    def weight(name: str, *shape: int) -> str:
        tensors.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
        return name

    for i, (step, a, b) in enumerate(steps):
        left, right, result = values[a % len(values)], values[b % len(values)], f"v{i}"
        if step == "MatMul":
            inputs = [left, weight(f"w{i}", WIDTH, WIDTH)]
            nodes.append(helper.make_node("MatMul", inputs, [result], name=f"layer{i}"))
        elif step == "bias":
            nodes.append(helper.make_node("Add", [weight(f"b{i}", WIDTH), left], [result]))
        elif step == "LayerNormalization":
            inputs = [left, weight(f"g{i}", WIDTH), weight(f"n{i}", WIDTH)]
            nodes.append(helper.make_node(step, inputs, [result], axis=-1))
        elif step == "halves":
            tensors.append(numpy_helper.from_array(np.array([2, 4]), f"s{i}"))
            halves = [f"{result}_0", f"{result}_1"]
            nodes.append(helper.make_node("Split", [left, f"s{i}"], halves, axis=3))
            nodes.append(helper.make_node("Concat", halves[::-1], [result], axis=3))
        elif step == "mean":
            nodes.append(helper.make_node("GlobalAveragePool", [left], [f"{result}_mean"]))
            nodes.append(helper.make_node("Add", [left, f"{result}_mean"], [result]))
        elif step == "swapped":
            nodes.append(helper.make_node("Transpose", [left], [result], perm=(0, 2, 1, 3)))
        else:
            nodes.append(helper.make_node(step, [left, right][: 1 + (step == "Add")], [result]))
        values.append(result)
    names = dict.fromkeys(values[1 + i % (len(values) - 1)] for i in outputs)
    shape = [batch, SIDE, SIDE, WIDTH]
    image, *results = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", *names)
    )
    graph = helper.make_graph(nodes, "g", [image], results, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    inferred.graph.value_info.extend([image, *results])
    return inferred.SerializeToString()


def run(model: bytes, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=16,
    ),
    outputs=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    batch=st.sampled_from([1, 2, "B"]),
    most_tokens=st.sampled_from([1, 2, 4, 8]),
)
def test_any_graph_computes_the_same(
    steps: list[tuple[str, int, int]], outputs: list[int], batch: int | str, most_tokens: int
) -> None:
    before = graph_of(steps, outputs, batch)
    model = onnx.load_model_from_string(before)
    loops = loop_tokens(model, most_tokens=most_tokens)
    assert loops <= sum(step == "MatMul" for step, *_ in steps)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=(2 if batch == "B" else batch, SIDE, SIDE, WIDTH))
    expected = run(before, x.astype(np.float32))
    results = run(model.SerializeToString(), x.astype(np.float32))
    for actual, other in zip(results, expected, strict=True):
        assert_allclose(actual, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_layers_between_two_others_share_a_loop() -> None:
    """A residual past an attention, and a branch that is read later than it could be."""
    steps = [
        ("MatMul", 0, 0),  # v0
        ("swapped", 1, 0),  # v1, what attention would be
        ("MatMul", 1, 0),  # v2, read only with what comes after it
        ("MatMul", 2, 0),  # v3
        ("Add", 3, 4),  # v4
        ("Add", 5, 1),  # v5, the residual
    ]
    model = onnx.load_model_from_string(graph_of(steps, [5], "B"))
    assert loop_tokens(model, most_tokens=4) == 2
    bodies = [node.attribute[0].g for node in model.graph.node if node.op_type == "Scan"]
    operators = sorted([node.op_type for node in body.node] for body in bodies)
    assert operators == [["MatMul"], ["MatMul", "MatMul", "Add", "Add"]]
    assert [node.op_type for node in model.graph.node].count("MatMul") == 0


@pytest.mark.parametrize("most_tokens", [16, 100, 3])
def test_few_tokens_need_no_loop(most_tokens: int) -> None:
    """Nor those that can only be taken by fewer than allowed: 16 by 2 instead of 3."""
    model = onnx.load_model_from_string(graph_of([("MatMul", 0, 0)], [0], 1))
    before = model.SerializeToString()
    assert loop_tokens(model, most_tokens=most_tokens) == 0
    assert model.SerializeToString() == before
