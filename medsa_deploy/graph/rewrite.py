"""A graph's nodes → nodes that compute the same: some replaced, some in loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from .files import import_onnx

FLOAT = 1
"""float32 in ONNX's numbering of types."""


class Rewrite:
    """The new nodes of a graph: those that stay, and the replacements of the others."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
        }
        """Sizes of each value that is not a weight; 0 stands for any size."""
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.nodes: list[Any] = []
        """The new graph's nodes, in any order."""
        self.count = 0
        """Number of patterns that were replaced."""
        self._tensors: dict[str, Any] = {}

    def source(self, value: str, operator: str) -> Any:
        """The node that computes a value, if it is the given operator; otherwise None."""
        node = self.made_by.get(value)
        return node if node is not None and node.op_type == operator else None

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        *,
        into: list[Any] | None = None,
        **options: Any,
    ) -> str:
        """Add a node to the graph, or to a loop's nodes; the name of its first output."""
        values = [outputs] if isinstance(outputs, str) else outputs
        node = import_onnx().helper.make_node(operator, inputs, values, name=values[0], **options)
        (self.nodes if into is None else into).append(node)
        return values[0]

    def shape(self, sizes: Sequence[int]) -> str:
        """The name of a tensor that holds a shape; 0 keeps an axis, −1 takes the remaining size."""
        name = "shape_" + "_".join(map(str, sizes))
        self._tensors[name] = import_onnx().helper.make_tensor(name, 7, [len(sizes)], sizes)
        return name

    def finish(self) -> bool:
        """Put the nodes that are read into the graph; False if no pattern was replaced."""
        if not self.count:
            return False
        graph = self.model.graph
        nodes = _in_order(self.nodes)
        read = {output.name for output in graph.output}
        backwards = []
        for node in reversed(nodes):
            if read.intersection(node.output):
                read.update(_reads(node))
                backwards.append(node)
        computed = {name for node in backwards for name in node.output}
        values = [value for value in graph.value_info if value.name in computed]
        tensors = {tensor.name: tensor for tensor in (*graph.initializer, *self._tensors.values())}
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(reversed(backwards))
        graph.value_info.extend(values)
        graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
        return True


class Loop:
    """The nodes of a loop's body, which may also read values outside of the loop."""

    def __init__(self, rewrite: Rewrite, name: str) -> None:
        self._rewrite, self._name = rewrite, name
        self._nodes: list[Any] = []
        self._inputs: list[str] = []

    def takes(self, part: str) -> str:
        """Add an input, of which each turn takes a part; its name."""
        self._inputs.append(f"{self._name}/{part}")
        return self._inputs[-1]

    def node(self, operator: str, inputs: Sequence[str], part: str, **options: Any) -> str:
        """Add a node; the name of its output."""
        name = f"{self._name}/{part}"
        return self._rewrite.node(operator, inputs, name, into=self._nodes, **options)

    def copy(self, node: Any, names: Mapping[str, str]) -> Any:
        """Add a copy of a node; `names` renames values that are inside the loop."""
        copied = type(node)()
        copied.CopyFrom(node)
        for values in (copied.input, copied.output):
            values[:] = [names.get(value, value) for value in values]
        self._nodes.append(copied)
        return copied

    def reshape(self, value: str, sizes: Sequence[int]) -> str:
        """A value with other axes."""
        part = value.removeprefix(f"{self._name}/")
        return self.node("Reshape", [value, self._rewrite.shape(sizes)], f"{part}_reshaped")

    def body(self, *outputs: str, axis: int) -> dict[str, Any]:
        """Attributes of the `Scan` whose turns give `outputs`; `axis`: the axis of its inputs."""
        helper = import_onnx().helper
        signature = (
            [helper.make_tensor_value_info(name, FLOAT, None) for name in names]
            for names in (self._inputs, outputs)
        )
        return {
            "body": helper.make_graph(self._nodes, self._name, *signature),
            "num_scan_inputs": len(self._inputs),
            "scan_input_axes": [axis] * len(self._inputs),
        }


def _in_order(nodes: Sequence[Any]) -> list[Any]:
    """Each node after those whose values it reads."""
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
    before = {
        i: [made_by[name] for name in sorted(_reads(node)) if name in made_by]
        for i, node in enumerate(nodes)
    }
    return [nodes[i] for i in TopologicalSorter(before).static_order()]


def _reads(node: Any) -> set[str]:
    """Names that a node reads, also inside of loop bodies."""
    inner = [_reads(inside) for attribute in node.attribute for inside in attribute.g.node]
    return {*node.input}.union(*inner)
