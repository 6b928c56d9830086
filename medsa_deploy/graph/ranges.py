"""A graph → the same graph that also gives the ranges of values inside it.

The graph itself reduces each value to its least and greatest element, and on request a sample: the
values are not stored. Each reduction follows the node that computes its value. Run in that order,
which is an option of ONNX Runtime, the graph takes no more memory than an ordinary run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from .files import import_onnx
from .float32_nodes import MOVES, value_types

LOW, HIGH, SAMPLE = "_low", "_high", "_sample"
SAMPLE_STRIDE = 13
"""A sample is every 13th element: a prime number, so that no axis is favoured."""


def computed_values(model: Any) -> list[str]:
    """Names of the float32 values that operators compute; moved values are left out."""
    types, float32 = value_types(model), import_onnx().TensorProto.FLOAT
    return [
        name
        for node in model.graph.node
        if node.op_type not in MOVES
        for name in node.output
        if types.get(name) == float32
    ]


def watch(model: Any, names: Collection[str], *, sampled: Collection[str] = ()) -> None:
    """Add outputs with the range of each value, and samples of some, in place.

    NAME_low and NAME_high are scalars; NAME_sample has one axis.
    """
    onnx = import_onnx()
    helper, graph = onnx.helper, model.graph
    if sampled:
        numbers = {"ends": [np.iinfo(np.int64).max], "starts": [0], "steps": [SAMPLE_STRIDE]}
        for name, value in {"flat": [-1], **numbers}.items():
            tensor = onnx.numpy_helper.from_array(np.array(value, np.int64), f"watch_{name}")
            graph.initializer.append(tensor)
    behind: dict[str, list[Any]] = {name: [] for name in (*names, *sampled)}
    for name, nodes in behind.items():
        for suffix, operator in ((LOW, "ReduceMin"), (HIGH, "ReduceMax")):
            nodes.append(helper.make_node(operator, [name], [name + suffix], keepdims=0))
            graph.output.append(_scalar(name + suffix))
    for name in dict.fromkeys(sampled):
        flat = f"{name}_flat"
        slices = [flat, "watch_starts", "watch_ends", "watch_flat", "watch_steps"]
        behind[name].append(helper.make_node("Reshape", [name, "watch_flat"], [flat]))
        behind[name].append(helper.make_node("Slice", slices, [name + SAMPLE]))
        kind = onnx.TensorProto.FLOAT
        graph.output.append(helper.make_tensor_value_info(name + SAMPLE, kind, ["sample"]))
    nodes = [node for tensor in graph.input for node in behind.get(tensor.name, ())]
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes += behind.get(name, ())
    del graph.node[:]
    graph.node.extend(nodes)


def _scalar(name: str) -> Any:
    onnx = import_onnx()
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [])
