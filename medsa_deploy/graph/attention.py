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
from typing import Any

from .files import import_onnx
from .rewrite import Loop, Rewrite

DOMAIN = "com.microsoft"
LEAST_TOKENS = 1024
"""Over fewer, scores are small, and the portable graph is as fast."""
MOST_QUERIES = 256
"""Of one step where there are relative positions. Fewer take longer, more take no less time."""
SWAP = (0, 2, 1, 3)
"""(M, heads, n, d) ⇄ (M, n, heads, d)."""


def fuse_attention(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Make softmax(QKᵀ)V of at least so many tokens one operator, in place; how many there were."""
    rewrite = Rewrite(model)
    for node in list(model.graph.node):
        found = _attention(rewrite, node)
        if found is None or rewrite.shapes[found[0].output[0]][-2] < least_tokens:
            rewrite.nodes.append(node)
            continue
        scores, softmax = found
        heads, width = rewrite.shapes[softmax.output[0]][1], rewrite.shapes[node.output[0]][3]
        options = {"domain": DOMAIN, "num_heads": heads, "scale": 1.0}
        positions = _wide_scores(rewrite, scores)
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
    rewrite: Rewrite, node: Any, wide: Sequence[str], key: str, options: dict[str, Any]
) -> str:
    """softmax([q, rh, rw]·[k, …]ᵀ)V image by image, and some of the grid's rows a step.

    → (M, steps, 1, queries, heads·d). All that is stored is the positions of a step's queries,
    (1, heads, queries, n).
    """
    rows, columns = _grid(rewrite, wide)
    heads, name = options["num_heads"], node.name
    fitting = [r for r in range(1, rows + 1) if rows % r == 0 and r * columns <= MOST_QUERIES]
    together = max(fitting, default=1)
    queries, tokens = together * columns, rows * columns
    step = Loop(rewrite, f"{name}/step")
    query, by_rows, by_columns = (step.takes(what) for what in ("query", "rows", "columns"))
    by_rows = step.reshape(by_rows, (1, heads, queries, rows, 1))
    by_columns = step.reshape(by_columns, (1, heads, queries, 1, columns))
    positions = step.node("Add", [by_rows, by_columns], "positions")
    query = step.node("Transpose", [query], "query_swapped", perm=(1, 0, 2))
    image = Loop(rewrite, f"{name}/image")
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


def bias_scores(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Add relative positions to scores of at least so many tokens, in place; how many there were.

    [q, rh, rw]·[k, onehot(row), onehot(column)] becomes q·k + rh[row] + rw[column].
    """
    rewrite = Rewrite(model)
    for node in list(model.graph.node):
        found = _wide_scores(rewrite, node)
        if found is None or rewrite.shapes[node.output[0]][-1] < least_tokens:
            rewrite.nodes.append(node)
            continue
        _add_positions(rewrite, node, *found)
        rewrite.count += 1
    rewrite.finish()
    return rewrite.count


def _add_positions(rewrite: Rewrite, node: Any, wide: Sequence[str], key: str) -> None:
    """The nodes that take the place of `node`: scores of [q, rh, rw] = `wide` and k."""
    query, rows, columns = wide
    grid = _grid(rewrite, wide)

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


def _flat(rewrite: Rewrite, value: str, order: Sequence[int], name: str) -> str:
    """(M, heads, n, d), or keys (M, heads, d, n), → (M, n, heads·d)."""
    source = rewrite.made_by.get(value)
    if source is not None and source.op_type == "Transpose":
        (permutation,) = source.attribute
        order = [permutation.ints[axis] for axis in order]
        value = source.input[0]
    if list(order) != [0, 1, 2, 3]:
        value = rewrite.node("Transpose", [value], f"{name}_swapped", perm=order)
    return rewrite.node("Reshape", [value, rewrite.shape((0, 0, -1))], name)


def _attention(rewrite: Rewrite, node: Any) -> tuple[Any, Any] | None:
    """Scores and softmax that a product of (M, heads, n, d) ends, where it is attention."""
    if node.op_type != "MatMul" or len(rewrite.shapes.get(node.output[0], ())) != 4:
        return None
    softmax = rewrite.source(node.input[0], "Softmax")
    scores = softmax and rewrite.source(softmax.input[0], "MatMul")
    return (scores, softmax) if scores else None


def _wide_scores(rewrite: Rewrite, node: Any) -> tuple[Sequence[str], str] | None:
    """[q, rh, rw] and k, where a product is of them and of k's positions."""
    if node.op_type != "MatMul":
        return None
    query = rewrite.source(node.input[0], "Concat")
    across = rewrite.source(node.input[1], "Transpose")
    key = across and rewrite.source(across.input[0], "Concat")
    if not (query and key and len(query.input) == 3 and len(key.input) == 2):
        return None
    return query.input, key.input[0]


def _grid(rewrite: Rewrite, wide: Sequence[str]) -> tuple[int, int]:
    """Rows and columns of the keys of [q, rh, rw]."""
    _, rows, columns = (rewrite.shapes[name][-1] for name in wide)
    return rows, columns
