"""A float32 graph → a float16 graph with some float32 nodes, float32 inputs and outputs.

Each node computes in one type, with casts between types; all readers of a value share one cast. The
operators' definitions decide the types: an input that can only be float32, such as the scales of
Resize, stays float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import import_onnx
from .float32_nodes import HALF, value_types

SUFFIX = "_float16"
ROUNDED = "_exact"


@dataclass(frozen=True, kw_only=True)
class Change:
    """The outcome of a pass over a graph."""

    changed: bool
    description: str
    """The changes, or the reason for none."""


def to_float16(model: Any, float32: Mapping[int, str]) -> Change:
    """Convert `model` in place; nodes whose index is in `float32` stay float32.

    Weights that float16 nodes read are rounded to float16. Weights that nodes of both types read
    are stored in both types. Inputs and outputs of the graph keep their types and names.
    """
    conversion = _Conversion(model)
    if not any(set(node.output) & conversion.floats for node in model.graph.node):
        return Change(changed=False, description="no node of this graph gives float32")
    if any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute):
        return Change(
            changed=False, description="this graph has control flow, which is not converted"
        )
    count = len(model.graph.node) - len(float32)
    if count == 0:
        return Change(changed=False, description="every node is a float32 island")
    for i, node in enumerate(list(model.graph.node)):
        conversion.convert(node, half=i not in float32)
    conversion.finish()
    description = f"{count} nodes to float16, {len(float32)} stay float32"
    return Change(changed=True, description=description)


def round_like_float16(model: Any, float32: Mapping[int, str]) -> Change:
    """Make float32 `model` round in place like its float16 form, without fusion.

    Outputs of nodes that would be float16, and the weights they read, go through float16 and back.
    ONNX Runtime on a CPU computes a float16 graph in float32 between operators and hides overflow;
    this form shows it.
    """
    onnx = import_onnx()
    floats = _floats(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    halves = [i not in float32 for i in range(len(model.graph.node))]
    exact = {name for i, n in enumerate(model.graph.node) if not halves[i] for name in n.input}
    nodes = []
    for half, node in zip(halves, model.graph.node, strict=True):
        nodes.append(node)
        if not half:
            continue
        for name in set(node.input) & weights.keys() & floats - exact:
            values = onnx.numpy_helper.to_array(weights[name])
            back = as_float16(values).astype(np.float32)
            weights[name].CopyFrom(onnx.numpy_helper.from_array(back, name))
        for k, name in enumerate(node.output):
            if name in floats:
                node.output[k] = name + ROUNDED
                nodes.append(_cast(name + ROUNDED, name + SUFFIX, onnx.TensorProto.FLOAT16))
                nodes.append(_cast(name + SUFFIX, name, onnx.TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return Change(changed=any(halves), description=f"{sum(halves)} nodes round to float16")


def as_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Float16 nearest to `values`; the caller ensures that finite values stay finite."""
    return values.astype(np.float16)


class _Conversion:
    """A graph during its conversion to float16: the type of each value, and the casts."""

    def __init__(self, model: Any) -> None:
        self.onnx = import_onnx()
        self.float32 = self.onnx.TensorProto.FLOAT
        self.float16 = self.onnx.TensorProto.FLOAT16
        self.graph = model.graph
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.floats = _floats(model)
        self.outputs = {value.name for value in self.graph.output}
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.read: set[str] = set()
        """Float32 weights that float32 nodes read."""
        self.halves: dict[str, Any] = {}
        """Weights in float16, by their float32 name."""
        self.types: dict[str, int] = {value.name: self.float32 for value in self.graph.input}
        self.aliases: dict[tuple[str, int], str] = {}
        """A value and a type → the value's name in that type."""
        self.nodes: list[Any] = []

    def convert(self, node: Any, *, half: bool) -> None:
        """Append a node after the casts of its inputs to the type it computes in."""
        kind = self.float16 if half else self.float32
        for k, name in enumerate(node.input):
            if name in self.floats:
                only_float32 = half and not self._may_be_float16(node, k)
                node.input[k] = self._in_type(name, self.float32 if only_float32 else kind)
        if half:
            self._convert_attributes(node)
        self.nodes.append(node)
        for k, name in enumerate(node.output):
            if name not in self.floats:
                continue
            self.types[name] = kind
            if half and name in self.outputs:
                node.output[k] = name + SUFFIX
                self.aliases[name, self.float16] = name + SUFFIX
                self.types[name] = self.float32
                self.nodes.append(_cast(name + SUFFIX, name, self.float32))

    def finish(self) -> None:
        """Put nodes, weights and types into the graph."""
        graph = self.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        tensors = [t for t in graph.initializer if t.name not in self.halves or t.name in self.read]
        tensors += self.halves.values()
        del graph.initializer[:]
        graph.initializer.extend(tensors)
        for value in graph.value_info:
            if value.name in self.floats:
                value.type.tensor_type.elem_type = self.types.get(value.name, self.float32)

    def _in_type(self, name: str, kind: int) -> str:
        """The name of a value in a type; adds a cast or a converted weight if it is missing."""
        if name in self.weights:
            if kind == self.float32:
                self.read.add(name)
                return name
            if name not in self.halves:
                values = as_float16(self.onnx.numpy_helper.to_array(self.weights[name]))
                tensor = self.onnx.numpy_helper.from_array(values, name + SUFFIX)
                self.halves[name] = tensor
            return name + SUFFIX
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.aliases:
            alias = name + (SUFFIX if kind == self.float16 else "_float32")
            self.nodes.append(_cast(name, alias, kind))
            self.aliases[name, kind] = alias
        return self.aliases[name, kind]

    def _may_be_float16(self, node: Any, k: int) -> bool:
        """Whether an operator's definition allows float16 at input k; the last one may repeat."""
        schema = self.onnx.defs.get_schema(node.op_type, self.opsets[node.domain], node.domain)
        return HALF in schema.inputs[min(k, len(schema.inputs) - 1)].types

    def _convert_attributes(self, node: Any) -> None:
        """Convert types in attributes: the target of a Cast, the value of a Constant."""
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = self.onnx.numpy_helper.from_array(np.zeros(1, np.float32))
            node.attribute.append(self.onnx.helper.make_attribute("value", zero))
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.float32:
                attribute.i = self.float16
            if attribute.HasField("t") and attribute.t.data_type == self.float32:
                values = as_float16(self.onnx.numpy_helper.to_array(attribute.t))
                attribute.t.CopyFrom(self.onnx.numpy_helper.from_array(values))


def _floats(model: Any) -> set[str]:
    """Names of float32 values and weights."""
    float32 = import_onnx().TensorProto.FLOAT
    return {name for name, kind in value_types(model).items() if kind == float32}


def _cast(name: str, result: str, kind: int) -> Any:
    """A Cast of the value `name` to a type; its output is `result`."""
    return import_onnx().helper.make_node("Cast", [name], [result], name=f"cast_{result}", to=kind)
