"""An encoder's graph → the same with what it does token by token in loops over some at a time.

From one attention to the next, linear layers, norms and adapters take every token by itself. A few
hundred tokens go through all of them before the next few hundred do, so what lies between two
layers is small and stays in the processor's cache: the hidden layer of a block takes 7 MB instead
of 53 for an image of 1024×1024, of 428 for a chunk of 8 slices. Products of fewer rows are no
slower, and faster where a chunk would be taken at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from .rewrite import Loop, Rewrite

MOST_TOKENS = 512
"""Of one turn."""
LEAST_TOKENS = 128
"""Of one turn, or its products are slow. Grids that cannot be divided like that are left alone."""
OPERATORS = frozenset({"Add", "Gelu", "LayerNormalization", "MatMul", "Split"})


def loop_tokens(model: Any, *, most_tokens: int = MOST_TOKENS) -> int:
    """Put stretches between attentions in loops, in place; how many there were."""
    rewrite = Rewrite(model)
    left = {node.output[0]: node for node in model.graph.node}
    for nodes in _Tokens(rewrite).stretches():
        tokens = prod(rewrite.shapes[nodes[0].output[0]][1:-1])
        turn = max(n for n in range(1, most_tokens + 1) if tokens % n == 0)
        found = _read_outside(nodes, model.graph)
        if not found or not any(node.op_type == "MatMul" for node in nodes):
            continue
        if min(LEAST_TOKENS, most_tokens) <= turn < tokens:
            _loop(rewrite, nodes, found, turn)
            rewrite.count += 1
            for node in nodes:
                del left[node.output[0]]
    rewrite.nodes += left.values()
    rewrite.finish()
    return rewrite.count


def _read_outside(nodes: Iterable[Any], graph: Any) -> list[str]:
    """Values of a stretch that other nodes read, or whoever runs the graph."""
    inside = {node.output[0] for node in nodes}
    read = {name for node in graph.node if node.output[0] not in inside for name in node.input}
    read.update(output.name for output in graph.output)
    return [name for node in nodes for name in node.output if name in read]


def _loop(rewrite: Rewrite, nodes: Sequence[Any], found: Sequence[str], turn: int) -> None:
    """The nodes of a stretch, on so many tokens in each turn of a loop that gives `found`."""
    weights = {tensor.name for tensor in rewrite.model.graph.initializer}
    inside = [name for node in nodes for name in node.output]
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    given = [name for name in read if name not in weights and name not in inside]
    name = f"{inside[0]}/tokens"
    loop = Loop(rewrite, name)
    names = {value: loop.takes(value) for value in given}
    names |= {value: f"{name}/{value}" for value in inside}
    for node in nodes:
        for attribute in loop.copy(node, names).attribute:
            if attribute.name == "axis":
                attribute.i = -1
    cut = [
        rewrite.node("Reshape", [value, rewrite.shape((-1, turn, rewrite.shapes[value][-1]))], to)
        for value, to in ((value, f"{names[value]}_cut") for value in given)
    ]
    made = [f"{names[value]}_made" for value in found]
    rewrite.node("Scan", cut, made, **loop.body(*(names[value] for value in found), axis=0))
    for value, one in zip(found, made, strict=True):
        rewrite.node("Reshape", [one, rewrite.shape((-1, *rewrite.shapes[value][1:]))], value)


class _Tokens:
    """Which nodes take every token by itself, and which of them lie between the same attentions."""

    def __init__(self, rewrite: Rewrite) -> None:
        self._shapes = rewrite.shapes
        self._graph = rewrite.model.graph
        self._axes = {tensor.name: len(tensor.dims) for tensor in self._graph.initializer}

    def stretches(self) -> list[list[Any]]:
        """Nodes on single tokens, in their order, by what they can be run together with.

        Two lie in one stretch if one reads the other's values and as many operators across tokens
        come before both. So no way out of a stretch leads back into it.
        """
        before = self._operators_before()
        stretch_of: dict[str, list[Any]] = {}
        for node in self._graph.node:
            if node.output[0] not in before:
                continue
            joined = [node]
            for name in node.input:
                other = stretch_of.get(name)
                if other is None or other is joined:
                    continue
                if before[other[0].output[0]] == before[node.output[0]]:
                    other += joined
                    joined = other
            stretch_of |= {name: joined for one in joined for name in one.output}
        return list({id(nodes): nodes for nodes in stretch_of.values()}.values())

    def _operators_before(self) -> dict[str, int]:
        """First output of a node on single tokens → how many others come before it, at the most.

        A node that is read by such nodes only counts as late as the earliest of them.
        """
        after: dict[str, int] = {}
        before: dict[str, int] = {}
        for node in self._graph.node:
            count = max((after.get(name, 0) for name in node.input), default=0)
            if self._takes_single_tokens(node):
                before[node.output[0]] = count
            else:
                count += 1
            after |= dict.fromkeys(node.output, count)
        readers: dict[str, list[str]] = {output.name: [""] for output in self._graph.output}
        for node in self._graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node.output[0])
        for node in reversed(self._graph.node):
            reading = [one for name in node.output for one in readers.get(name, [])]
            if node.output[0] in before and reading and all(one in before for one in reading):
                before[node.output[0]] = min(before[one] for one in reading)
        return before

    def _takes_single_tokens(self, node: Any) -> bool:
        """Whether all its values are (images, …, channels) of one grid, and its weights vectors.

        Of a product, they are a matrix.
        """
        axes = [self._axes[name] for name in node.input if name in self._axes]
        values = [name for name in (*node.input, *node.output) if name and name not in self._axes]
        shapes = [self._shapes.get(name, ()) for name in values]
        grids = {tuple(shape[1:-1]) for shape in shapes}
        if node.op_type not in OPERATORS or len(grids) != 1 or not prod(*grids) > 1:
            return False
        last = len(shapes[0]) - 1
        along = [one.i for one in node.attribute if one.name == "axis"]
        if not all(axis in (-1, last) for axis in along):
            return False
        return axes == [2] if node.op_type == "MatMul" else all(n < 2 for n in axes)
