"""The nodes of a graph while some are replaced, and loops in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from .files import import_onnx

FLOAT = 1
"""Of ONNX's types."""


class Rewrite:
    """A graph's nodes: those that stay, and what takes the place of the others."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
        }
        """Name → sizes of a value that is no weight; 0 is any."""
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.nodes: list[Any] = []
        """Of the new graph, in any order."""
        self.count = 0
        """How many patterns were replaced."""
        self._tensors: dict[str, Any] = {}

    def source(self, value: str, operator: str) -> Any:
        """The node that makes a value, where it is such an operator."""
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
        """Add a node, to the graph or a loop's nodes; the name of what it makes first."""
        made = [outputs] if isinstance(outputs, str) else outputs
        node = import_onnx().helper.make_node(operator, inputs, made, name=made[0], **options)
        (self.nodes if into is None else into).append(node)
        return made[0]

    def shape(self, sizes: Sequence[int]) -> str:
        """The name of a shape; 0 keeps an axis, −1 takes what is left."""
        name = "shape_" + "_".join(map(str, sizes))
        self._tensors[name] = import_onnx().helper.make_tensor(name, 7, [len(sizes)], sizes)
        return name

    def finish(self) -> bool:
        """Put the nodes back, without those and tensors nothing reads; False if none is new."""
        if not self.count:
            return False
        graph = self.model.graph
        nodes = _in_order(self.nodes)
        needed = {output.name for output in graph.output}
        kept = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(_reads(node))
                kept.append(node)
        made = {name for node in kept for name in node.output}
        values = [value for value in graph.value_info if value.name in made]
        every = [*graph.initializer, *self._tensors.values()]
        tensors = {tensor.name: tensor for tensor in every if tensor.name in needed}
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.value_info.extend(values)
        graph.initializer.extend(tensors.values())
        return True


class Loop:
    """The nodes of a loop's body, which may read what is outside."""

    def __init__(self, rewrite: Rewrite, name: str) -> None:
        self._rewrite, self._name = rewrite, name
        self._nodes: list[Any] = []
        self._taken: list[str] = []

    def takes(self, what: str) -> str:
        """The name of one more value that the body takes a part of in each turn."""
        self._taken.append(f"{self._name}/{what}")
        return self._taken[-1]

    def node(self, operator: str, inputs: Sequence[str], what: str, **options: Any) -> str:
        """Add a node; the name of what it makes."""
        name = f"{self._name}/{what}"
        return self._rewrite.node(operator, inputs, name, into=self._nodes, **options)

    def copy(self, node: Any, names: Mapping[str, str]) -> Any:
        """Add a copy of a node, with `names` for those of values that are not outside."""
        made = type(node)()
        made.CopyFrom(node)
        for values in (made.input, made.output):
            values[:] = [names.get(value, value) for value in values]
        self._nodes.append(made)
        return made

    def reshape(self, value: str, sizes: Sequence[int]) -> str:
        """A value with other axes."""
        what = value.removeprefix(f"{self._name}/")
        return self.node("Reshape", [value, self._rewrite.shape(sizes)], f"{what}_reshaped")

    def body(self, *made: str, axis: int) -> dict[str, Any]:
        """Attributes of the `Scan` whose turns give `made`. `axis`: which it goes along."""
        helper = import_onnx().helper
        given, found = (
            [helper.make_tensor_value_info(name, FLOAT, None) for name in names]
            for names in (self._taken, made)
        )
        return {
            "body": helper.make_graph(self._nodes, self._name, given, found),
            "num_scan_inputs": len(given),
            "scan_input_axes": [axis] * len(given),
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
    """What a node takes, in the bodies of loops too."""
    inner = [_reads(one) for attribute in node.attribute for one in attribute.g.node]
    return {*node.input}.union(*inner)
