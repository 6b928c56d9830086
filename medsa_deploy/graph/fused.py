"""A graph → the same with attention over many tokens as one operator of ONNX Runtime.

`MultiHeadAttention` computes softmax(scale·QKᵀ)V block by block, as FlashAttention does (Dao and
others, 2022), and never stores the scores: over the 64×64 tokens of an image of 1024×1024 they are
67 MB a head. It takes queries, keys and values as (M, n, heads·d), so what had brought the heads to
the front goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import import_onnx, load_graph, save_beside

DOMAIN = "com.microsoft"
LEAST_TOKENS = 1024
"""Over fewer, scores are small, and ONNX Runtime is faster with separate operators."""
SWAP = (0, 2, 1, 3)
"""(M, heads, n, d) ⇄ (M, n, heads, d)."""


def write_fused(encoder: list[Path], path: Path) -> bool:
    """Write an encoder once more with its attention fused; False, and nothing, if it has none.

    `encoder`: its files, the last of which holds the weights. They are shared, not copied.
    """
    model = load_graph(encoder[0])
    if not fuse_attention(model):
        return False
    save_beside(model, path, encoder[-1])
    return True


def fuse_attention(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Fuse softmax(QKᵀ)V of at least so many tokens, in place; how many there were."""
    fusion = _Fusion(model)
    for node in list(model.graph.node):
        fusion.visit(node, least_tokens)
    if fusion.fused:
        fusion.finish()
    return fusion.fused


class _Fusion:
    """The nodes of a graph while attention is fused."""

    def __init__(self, model: Any) -> None:
        self.onnx = import_onnx()
        self.model = model
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
        }
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.fused = 0

    def visit(self, node: Any, least_tokens: int) -> None:
        """Keep a node, or put the fused operator where the last of a pattern's nodes stood."""
        found = self._attention(node)
        if found is None or self.shapes[found[0].output[0]][-2] < least_tokens:
            self.nodes.append(node)
            return
        scores, softmax = found
        query, key = scores.input
        heads, width = self.shapes[softmax.output[0]][1], self.shapes[node.output[0]][3]
        name = node.name
        q = self._flat(query, SWAP, name, "query")
        k = self._flat(key, (0, 3, 1, 2), name, "key")
        v = self._flat(node.input[1], SWAP, name, "value")
        joined = self._node(
            "MultiHeadAttention",
            [q, k, v],
            f"{name}/fused",
            domain=DOMAIN,
            num_heads=heads,
            scale=1.0,
        )
        shape = self._shape((0, 0, heads, width))
        apart = self._node("Reshape", [joined, shape], f"{name}/heads")
        self._node("Transpose", [apart], node.output[0], perm=SWAP)
        self.fused += 1

    def _attention(self, node: Any) -> tuple[Any, Any] | None:
        """Scores and softmax that a product of (M, heads, n, d) ends, where it is attention."""
        if node.op_type != "MatMul" or len(self.shapes.get(node.output[0], ())) != 4:
            return None
        softmax = self.made_by.get(node.input[0])
        if softmax is None or softmax.op_type != "Softmax":
            return None
        scores = self.made_by.get(softmax.input[0])
        if scores is None or scores.op_type != "MatMul":
            return None
        return scores, softmax

    def _flat(self, value: str, order: Sequence[int], name: str, what: str) -> str:
        """(M, heads, n, d), or keys (M, heads, d, n), → (M, n, heads·d)."""
        source = self.made_by.get(value)
        if source is not None and source.op_type == "Transpose":
            (permutation,) = source.attribute
            order = [permutation.ints[axis] for axis in order]
            value = source.input[0]
        if list(order) != [0, 1, 2, 3]:
            value = self._node("Transpose", [value], f"{name}/{what}_swapped", perm=order)
        return self._node("Reshape", [value, self._shape((0, 0, -1))], f"{name}/{what}")

    def finish(self) -> None:
        """Put the nodes back, without those that nothing reads any more."""
        graph = self.model.graph
        needed = {output.name for output in graph.output}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        del graph.node[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(self.tensors.values())
        kept_values = [value for value in graph.value_info if value.name in needed]
        del graph.value_info[:]
        graph.value_info.extend(kept_values)
        self.model.opset_import.append(self.onnx.helper.make_opsetid(DOMAIN, 1))

    def _shape(self, sizes: tuple[int, ...]) -> str:
        name = "shape_" + "_".join(map(str, sizes))
        self.tensors[name] = self.onnx.helper.make_tensor(name, 7, [len(sizes)], sizes)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **options: Any) -> str:
        node = self.onnx.helper.make_node(operator, inputs, [output], name=output, **options)
        self.nodes.append(node)
        return output
