"""A float32 graph → the nodes that stay float32 in its float16 form, with reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from medsa_deploy.bundle.node_names import block_of, module_of

from .files import import_onnx

FLOAT16_MAX = 65504.0
HEADROOM = 4.0
"""Values are measured on a few images; on other images they may be this many times larger."""

OPERATORS = {
    "LayerNormalization": "norms",
    "BatchNormalization": "norms",
    "GroupNormalization": "norms",
    "InstanceNormalization": "norms",
    "LpNormalization": "norms",
    "ReduceL2": "norms",
    "Softmax": "softmax",
    "LogSoftmax": "softmax",
}
"""Operators that always stay float32: norms overflow in SAM's encoders; softmax loses its tail."""
COORDINATES = "point_coords"
PERIODIC = ("Sin", "Cos")
"""In float16, coordinates up to 1024 are exact to half a pixel, and large phases are noise."""
MAKERS = ("Cast", "Constant", "ConstantOfShape")
"""Operators with an attribute for the type of their output."""
HALF = "tensor(float16)"
"""Float16 in the operators' definitions."""
MOVES = (
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that move values and compute none."""


def float32_nodes(
    model: Any, *, blocks: Collection[str] = (), ranges: Mapping[str, float] | None = None
) -> dict[int, str]:
    """Index of each node that stays float32 → the reason.

    `blocks`: blocks with all of their nodes in float32. `ranges`: measured magnitudes of values.

    1. Norms and softmax. 2. Nodes of `blocks`. 3. Readers of constants beyond float16.
    4. Readers and writers of values that come near float16's limit. 5. Operators without a float16
    form. 6. The way from coordinates to the positional encoding. 7. Moves between float32 nodes.
    """
    nodes = list(model.graph.node)
    types = value_types(model)
    floats = {name for name, kind in types.items() if kind == import_onnx().TensorProto.FLOAT}
    constants = _too_large(model)
    hot = {name for name, top in (ranges or {}).items() if not top * HEADROOM <= FLOAT16_MAX}
    reasons: dict[int, str] = {}
    for i, node in enumerate(nodes):
        touched = set(node.input) | set(node.output)
        if not touched & floats:
            continue
        if reason := OPERATORS.get(node.op_type):  # Case 1
            reasons[i] = reason
        elif block_of(module_of(node)) in blocks:  # Case 2
            reasons[i] = "blocks"
        elif touched & constants:  # Case 3
            reasons[i] = "constants beyond float16"
        elif touched & hot:  # Case 4
            reasons[i] = "values beyond float16"
        elif not _has_float16_form(model, node, floats):  # Case 5
            reasons[i] = "operators without float16"
    for i in _positional(nodes):  # Case 6
        reasons.setdefault(i, "coordinates")
    for i in _between(model, nodes, set(reasons)):  # Case 7
        reasons[i] = "moves between islands"
    return reasons


def value_types(model: Any) -> dict[str, int]:
    """Element type of every value and initializer, inferred without the weights."""
    onnx = import_onnx()
    graph = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    light.graph.value_info.extend(graph.value_info)
    types: dict[str, int] = {}
    for tensor in graph.initializer:
        types[tensor.name] = tensor.data_type
        shape = list(tensor.dims)
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
        )
    inferred = onnx.shape_inference.infer_shapes(light).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _too_large(model: Any) -> set[str]:
    """Names of constants with finite values that float16 cannot hold. It can hold infinities."""
    onnx = import_onnx()
    tensors = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        tensors += [(node.output[0], a.t) for a in node.attribute if a.HasField("t")]
    names = set()
    for name, tensor in tensors:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if (np.isfinite(values) & (np.abs(values) > FLOAT16_MAX)).any():
                names.add(name)
    return names


def _has_float16_form(model: Any, node: Any, floats: set[str]) -> bool:
    """Whether an operator's definition allows float16 for a node's floats; Range's does not."""
    onnx = import_onnx()
    versions = {entry.domain: entry.version for entry in model.opset_import}
    try:
        schema = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
    except Exception:  # an operator that onnx does not define stays as it is
        return False
    outputs = set(node.output) & floats
    if outputs and not set(node.input) & floats and node.op_type not in MAKERS:
        return False  # the definition fixes the type of its output
    parameters = schema.outputs if outputs else schema.inputs[:1]
    return all(HALF in parameter.types for parameter in parameters[:1])


def _positional(nodes: list[Any]) -> set[int]:
    """Nodes between the coordinates and the positional encoding's sines, sines included."""
    reached, after = {COORDINATES}, set()
    for i, node in enumerate(nodes):
        if set(node.input) & reached:
            after.add(i)
            if node.op_type not in PERIODIC:
                reached |= set(node.output)
    values: set[str] = set()
    positional = set()
    for i in sorted(after, reverse=True):
        node = nodes[i]
        if node.op_type in PERIODIC or set(node.output) & values:
            positional.add(i)
            values |= set(node.input)
    return positional


def _between(model: Any, nodes: list[Any], float32: set[int]) -> Iterable[int]:
    """Moves from float32 nodes to float32 nodes: float16 there would only round."""
    consumers: dict[str, set[int]] = {}
    for i, node in enumerate(nodes):
        for name in node.input:
            consumers.setdefault(name, set()).add(i)
    outputs = {value.name for value in model.graph.output}
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    inputs = {value.name for value in model.graph.input}

    def ends_in_float32(i: int, ends: set[int]) -> bool:
        return all(
            consumers.get(name, set()) <= ends and (name in outputs or consumers.get(name))
            for name in nodes[i].output
        )

    ends = set(float32)
    for i in reversed(range(len(nodes))):
        if nodes[i].op_type in MOVES and ends_in_float32(i, ends):
            ends.add(i)
    starts = set(float32)
    for i, node in enumerate(nodes):
        data = node.input[0] if node.input else ""
        if i in ends and (data in inputs or makers.get(data, -1) in starts):
            starts.add(i)
    return sorted(starts - float32)
