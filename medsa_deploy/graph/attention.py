"""An encoder's graph → the same with attention over many tokens as one backend runs it best.

ONNX Runtime's `MultiHeadAttention` computes softmax(QKᵀ)V block by block, as FlashAttention does
(Dao and others, 2022), and never stores the scores: over the 64×64 tokens of an image of 1024×1024
they are 67 MB a head. Relative positions it takes only as a stored bias, so attention with them
goes query by query (Rabe and Staats, 2021): some of the grid's rows at a time.

OpenVINO fuses the products around a softmax by itself, and a bias [rh, rw] that is broadcast over
the keys' rows and columns with them. So relative positions are added there, where portable graphs
multiply wider queries and keys (folding 6), which takes three times the work at 64×64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.manifest import Role

from .files import import_onnx, load_graph, save_beside

DOMAIN = "com.microsoft"
LEAST_TOKENS = 1024
"""Over fewer, scores are small, and the portable graph is as fast."""
MOST_QUERIES = 256
"""Of one step where there are relative positions. Fewer take longer, more take no less time."""
FLOAT = 1
"""Of ONNX's types."""
SWAP = (0, 2, 1, 3)
"""(M, heads, n, d) ⇄ (M, n, heads, d)."""


def write_own_encoders(encoder: Sequence[Path]) -> dict[Role, Path]:
    """Write a backend's own encoder beside a portable one, for each that runs another form better.

    `encoder`: its files, the last of which holds the weights; they are shared, not copied. The new
    files have the backend's name before the suffix: `encoder.openvino.onnx`.
    """
    written: dict[Role, Path] = {}
    rewrites: tuple[tuple[Role, Any], ...] = (
        ("encoder-onnxruntime", fuse_attention),
        ("encoder-openvino", bias_scores),
    )
    for role, rewrite in rewrites:
        model = load_graph(encoder[0])
        if rewrite(model):
            stem, rest = encoder[0].name.split(".", 1)
            backend = role.removeprefix("encoder-")
            written[role] = encoder[0].with_name(f"{stem}.{backend}.{rest}")
            save_beside(model, written[role], encoder[-1])
    return written


def fuse_attention(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Make softmax(QKᵀ)V of at least so many tokens one operator, in place; how many there were."""
    rewrite = _Rewrite(model)
    for node in list(model.graph.node):
        found = rewrite.attention(node)
        if found is None or rewrite.shapes[found[0].output[0]][-2] < least_tokens:
            rewrite.nodes.append(node)
            continue
        scores, softmax = found
        heads, width = rewrite.shapes[softmax.output[0]][1], rewrite.shapes[node.output[0]][3]
        options = {"domain": DOMAIN, "num_heads": heads, "scale": 1.0}
        positions = rewrite.wide_scores(scores)
        if positions is None:
            q = _flat(rewrite, scores.input[0], SWAP, f"{node.name}/query")
            k = _flat(rewrite, scores.input[1], (0, 3, 1, 2), f"{node.name}/key")
            v = _flat(rewrite, node.input[1], SWAP, f"{node.name}/value")
            joined = rewrite.node("MultiHeadAttention", [q, k, v], f"{node.name}/fused", **options)
        else:
            joined = _by_rows(rewrite, node, *positions, options)
        shape = rewrite.shape((0, -1, heads, width))
        apart = rewrite.node("Reshape", [joined, shape], f"{node.name}/heads")
        rewrite.node("Transpose", [apart], node.output[0], perm=SWAP)
        rewrite.count += 1
    if rewrite.finish():
        model.opset_import.append(import_onnx().helper.make_opsetid(DOMAIN, 1))
    return rewrite.count


def _by_rows(
    rewrite: _Rewrite, node: Any, wide: Sequence[str], key: str, options: dict[str, Any]
) -> str:
    """softmax([q, rh, rw]·[k, …]ᵀ)V image by image, and some of the grid's rows a step.

    → (M, steps, 1, queries, heads·d). All that is stored is the positions of a step's queries,
    (1, heads, queries, n).
    """
    rows, columns = rewrite.grid(wide)
    heads, name = options["num_heads"], node.name
    fitting = [r for r in range(1, rows + 1) if rows % r == 0 and r * columns <= MOST_QUERIES]
    together = max(fitting, default=1)
    queries, tokens = together * columns, rows * columns
    step = _Loop(rewrite, f"{name}/step")
    query, by_rows, by_columns = (step.takes(what) for what in ("query", "rows", "columns"))
    by_rows = step.reshape(by_rows, (1, heads, queries, rows, 1))
    by_columns = step.reshape(by_columns, (1, heads, queries, 1, columns))
    positions = step.node("Add", [by_rows, by_columns], "positions")
    query = step.node("Transpose", [query], "query_swapped", perm=(1, 0, 2))
    image = _Loop(rewrite, f"{name}/image")
    given = [image.takes(what) for what in ("query", "rows", "columns", "key", "value")]
    cut = [image.reshape(one, (heads, rows // together, queries, -1)) for one in given[:3]]
    taken = [
        step.reshape(query, (1, queries, -1)),
        *(image.reshape(one, (1, heads, tokens, -1)) for one in given[3:]),
        *("", "", step.reshape(positions, (1, heads, queries, tokens))),
    ]
    made = step.node("MultiHeadAttention", taken, "fused", **options)
    made = image.node("Scan", cut, "steps", **step.body(made, axis=1))
    every = [*wide, key, node.input[1]]
    return rewrite.node("Scan", every, f"{name}/images", **image.body(made, axis=0))


class _Loop:
    """The nodes of a loop's body, which may read what is outside."""

    def __init__(self, rewrite: _Rewrite, name: str) -> None:
        self._rewrite, self._name = rewrite, name
        self._nodes: list[Any] = []
        self._taken: list[str] = []

    def takes(self, what: str) -> str:
        """The name of one more value that the body takes a part of in each turn."""
        self._taken.append(f"{self._name}/{what}")
        return self._taken[-1]

    def node(self, operator: str, inputs: list[str], what: str, **options: Any) -> str:
        """Add a node; the name of what it makes."""
        name = f"{self._name}/{what}"
        return self._rewrite.node(operator, inputs, name, into=self._nodes, **options)

    def reshape(self, value: str, sizes: tuple[int, ...]) -> str:
        """A value with other axes."""
        what = value.removeprefix(f"{self._name}/")
        return self.node("Reshape", [value, self._rewrite.shape(sizes)], f"{what}_reshaped")

    def body(self, made: str, *, axis: int) -> dict[str, Any]:
        """Attributes of the `Scan` whose turns give `made`. `axis`: which it goes along."""
        helper = import_onnx().helper
        given, found = (
            [helper.make_tensor_value_info(name, FLOAT, None) for name in names]
            for names in (self._taken, [made])
        )
        return {
            "body": helper.make_graph(self._nodes, self._name, given, found),
            "num_scan_inputs": len(given),
            "scan_input_axes": [axis] * len(given),
        }


def bias_scores(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Add relative positions to scores of at least so many tokens, in place; how many there were.

    [q, rh, rw]·[k, onehot(row), onehot(column)] becomes q·k + rh[row] + rw[column].
    """
    rewrite = _Rewrite(model)
    for node in list(model.graph.node):
        found = rewrite.wide_scores(node)
        if found is None or rewrite.shapes[node.output[0]][-1] < least_tokens:
            rewrite.nodes.append(node)
            continue
        _add_positions(rewrite, node, *found)
        rewrite.count += 1
    rewrite.finish()
    return rewrite.count


def _add_positions(rewrite: _Rewrite, node: Any, wide: Sequence[str], key: str) -> None:
    """The nodes that take the place of `node`: scores of [q, rh, rw] = `wide` and k."""
    query, rows, columns = wide
    grid = rewrite.grid(wide)

    def reshaped(value: str, axes: tuple[int, ...], what: str) -> str:
        shape = rewrite.shape((0, 0, 0, *axes))
        return rewrite.node("Reshape", [value, shape], f"{node.name}/{what}")

    across = rewrite.node("Transpose", [key], f"{node.name}/key", perm=(0, 1, 3, 2))
    scores = rewrite.node("MatMul", [query, across], f"{node.name}/scores")
    total = reshaped(scores, grid, "grid")
    for bias, axes, what in ((rows, (grid[0], 1), "rows"), (columns, (1, grid[1]), "columns")):
        added = [total, reshaped(bias, axes, what)]
        total = rewrite.node("Add", added, f"{node.name}/with_{what}")
    shape = rewrite.shape((0, 0, 0, grid[0] * grid[1]))
    rewrite.node("Reshape", [total, shape], node.output[0])


def _flat(rewrite: _Rewrite, value: str, order: Sequence[int], name: str) -> str:
    """(M, heads, n, d), or keys (M, heads, d, n), → (M, n, heads·d)."""
    source = rewrite.made_by.get(value)
    if source is not None and source.op_type == "Transpose":
        (permutation,) = source.attribute
        order = [permutation.ints[axis] for axis in order]
        value = source.input[0]
    if list(order) != [0, 1, 2, 3]:
        value = rewrite.node("Transpose", [value], f"{name}_swapped", perm=order)
    return rewrite.node("Reshape", [value, rewrite.shape((0, 0, -1))], name)


class _Rewrite:
    """The nodes of a graph while some are replaced."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
        }
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.nodes: list[Any] = []
        self.count = 0
        """How many patterns were replaced."""
        self._tensors: dict[str, Any] = {}

    def attention(self, node: Any) -> tuple[Any, Any] | None:
        """Scores and softmax that a product of (M, heads, n, d) ends, where it is attention."""
        if node.op_type != "MatMul" or len(self.shapes.get(node.output[0], ())) != 4:
            return None
        softmax = self._source(node.input[0], "Softmax")
        scores = softmax and self._source(softmax.input[0], "MatMul")
        return (scores, softmax) if scores else None

    def wide_scores(self, node: Any) -> tuple[Sequence[str], str] | None:
        """[q, rh, rw] and k, where a product is of them and of k's positions."""
        if node.op_type != "MatMul":
            return None
        query = self._source(node.input[0], "Concat")
        across = self._source(node.input[1], "Transpose")
        key = across and self._source(across.input[0], "Concat")
        if not (query and key and len(query.input) == 3 and len(key.input) == 2):
            return None
        return query.input, key.input[0]

    def _source(self, value: str, operator: str) -> Any:
        """The node that makes a value, where it is such an operator."""
        node = self.made_by.get(value)
        return node if node is not None and node.op_type == operator else None

    def grid(self, wide: Sequence[str]) -> tuple[int, int]:
        """Rows and columns of the keys of [q, rh, rw]."""
        _, rows, columns = (self.shapes[name][-1] for name in wide)
        return rows, columns

    def node(
        self,
        operator: str,
        inputs: list[str],
        output: str,
        *,
        into: list[Any] | None = None,
        **options: Any,
    ) -> str:
        """Add a node, to the graph or a step's nodes; the name of what it makes."""
        made = import_onnx().helper.make_node(operator, inputs, [output], name=output, **options)
        (self.nodes if into is None else into).append(made)
        return output

    def shape(self, sizes: tuple[int, ...]) -> str:
        """The name of a shape; 0 keeps an axis, −1 takes what is left."""
        name = "shape_" + "_".join(map(str, sizes))
        self._tensors[name] = import_onnx().helper.make_tensor(name, 7, [len(sizes)], sizes)
        return name

    def finish(self) -> bool:
        """Put the nodes back, without those and tensors nothing reads; False if none is new."""
        if not self.count:
            return False
        graph = self.model.graph
        needed = {output.name for output in graph.output}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(_reads(node))
                kept.append(node)
        values = [value for value in graph.value_info if value.name in needed]
        tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.value_info.extend(values)
        graph.initializer.extend([*tensors, *self._tensors.values()])
        return True


def _reads(node: Any) -> set[str]:
    """What a node takes, in the bodies of loops too."""
    inner = [_reads(one) for attribute in node.attribute for one in attribute.g.node]
    return {*node.input}.union(*inner)
