"""An encoder's graph → the same graph with attention in the form that one backend runs fastest.

ONNX Runtime's `MultiHeadAttention` computes softmax(QKᵀ)V block by block, like FlashAttention (Dao
and others, 2022), and never stores the scores: 67 MB a head for the 64×64 tokens of an image of
1024×1024. It takes relative positions only as a stored bias. Attention with relative positions
therefore computes a few of the grid's rows at a time (Rabe and Staats, 2021).

OpenVINO fuses the products around a softmax, together with a bias [rh, rw] that is broadcast over
the keys' rows and columns. For OpenVINO the relative positions are therefore added. Portable graphs
multiply wider queries and keys instead (folding 6), three times the work at 64×64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .files import import_onnx
from .rewrite import Loop, Rewrite

DOMAIN = "com.microsoft"
LEAST_TOKENS = 1024
"""With fewer tokens, scores are small, and the portable graph is as fast."""
MOST_QUERIES = 256
"""Queries of one step with relative positions. Fewer are slower; more are no faster."""
SWAP = (0, 2, 1, 3)
"""(M, heads, n, d) ⇄ (M, n, heads, d)."""


def fuse_attention(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Fuse each softmax(QKᵀ)V over at least `least_tokens` tokens, in place; the number fused.

    1. An attention over fewer tokens stays as it is.
    2. Attention without relative positions becomes one `MultiHeadAttention`.
    3. Attention with relative positions becomes a loop over images and rows of the grid.
    """
    rewrite = Rewrite(model)
    for node in list(model.graph.node):
        attention = _attention(rewrite, node)
        if attention is None or rewrite.shapes[attention[0].output[0]][-2] < least_tokens:
            rewrite.nodes.append(node)  # Case 1
            continue
        scores, softmax = attention
        heads, width = rewrite.shapes[softmax.output[0]][1], rewrite.shapes[node.output[0]][3]
        options = {"domain": DOMAIN, "num_heads": heads, "scale": 1.0}
        positions = _wide_scores(rewrite, scores)
        if positions is None:  # Case 2
            q = _flat(rewrite, scores.input[0], SWAP, f"{node.name}/query")
            k = _flat(rewrite, scores.input[1], (0, 3, 1, 2), f"{node.name}/key")
            v = _flat(rewrite, node.input[1], SWAP, f"{node.name}/value")
            joined = rewrite.node("MultiHeadAttention", [q, k, v], f"{node.name}/fused", **options)
        else:  # Case 3
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
    """softmax([q, rh, rw]·[k, …]ᵀ)V image by image, with some of the grid's rows a step.

    → (M, steps, 1, queries, heads·d). Only the positions of a step's queries are stored:
    (1, heads, queries, n).
    """
    rows, columns = _grid(rewrite, wide)
    heads, name = options["num_heads"], node.name
    fitting = [r for r in range(1, rows + 1) if rows % r == 0 and r * columns <= MOST_QUERIES]
    together = max(fitting, default=1)
    queries, tokens = together * columns, rows * columns
    step = Loop(rewrite, f"{name}/step")
    query, by_rows, by_columns = (step.takes(part) for part in ("query", "rows", "columns"))
    by_rows = step.reshape(by_rows, (1, heads, queries, rows, 1))
    by_columns = step.reshape(by_columns, (1, heads, queries, 1, columns))
    positions = step.node("Add", [by_rows, by_columns], "positions")
    query = step.node("Transpose", [query], "query_swapped", perm=(1, 0, 2))
    image = Loop(rewrite, f"{name}/image")
    wide_parts = [image.takes(part) for part in ("query", "rows", "columns")]
    keys_and_values = [image.takes(part) for part in ("key", "value")]
    by_step = (heads, rows // together, queries, -1)
    pieces = [image.reshape(tensor, by_step) for tensor in wide_parts]
    operands = [
        step.reshape(query, (1, queries, -1)),
        *(image.reshape(tensor, (1, heads, tokens, -1)) for tensor in keys_and_values),
        *("", "", step.reshape(positions, (1, heads, queries, tokens))),
    ]
    fused = step.node("MultiHeadAttention", operands, "fused", **options)
    steps = image.node("Scan", pieces, "steps", **step.body(fused, axis=1))
    inputs = [*wide, key, node.input[1]]
    return rewrite.node("Scan", inputs, f"{name}/images", **image.body(steps, axis=0))


def bias_scores(model: Any, *, least_tokens: int = LEAST_TOKENS) -> int:
    """Turn relative positions into additions, in place; the number of scores that were changed.

    [q, rh, rw]·[k, onehot(row), onehot(column)] becomes q·k + rh[row] + rw[column]. Scores over
    fewer than `least_tokens` tokens stay as they are.
    """
    rewrite = Rewrite(model)
    for node in list(model.graph.node):
        wide_and_key = _wide_scores(rewrite, node)
        if wide_and_key is None or rewrite.shapes[node.output[0]][-1] < least_tokens:
            rewrite.nodes.append(node)
            continue
        _add_positions(rewrite, node, *wide_and_key)
        rewrite.count += 1
    rewrite.finish()
    return rewrite.count


def _add_positions(rewrite: Rewrite, node: Any, wide: Sequence[str], key: str) -> None:
    """Add the nodes that replace `node`: scores of [q, rh, rw] = `wide` and k."""
    query, rows, columns = wide
    grid = _grid(rewrite, wide)

    def reshaped(value: str, axes: tuple[int, ...], part: str) -> str:
        shape = rewrite.shape((0, 0, 0, *axes))
        return rewrite.node("Reshape", [value, shape], f"{node.name}/{part}")

    across = rewrite.node("Transpose", [key], f"{node.name}/key", perm=(0, 1, 3, 2))
    scores = rewrite.node("MatMul", [query, across], f"{node.name}/scores")
    total = reshaped(scores, grid, "grid")
    for bias, axes, part in ((rows, (grid[0], 1), "rows"), (columns, (1, grid[1]), "columns")):
        added = [total, reshaped(bias, axes, part)]
        total = rewrite.node("Add", added, f"{node.name}/with_{part}")
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
    """The scores and the softmax of an attention that ends in `node`; None for another node."""
    if node.op_type != "MatMul" or len(rewrite.shapes.get(node.output[0], ())) != 4:
        return None
    softmax = rewrite.source(node.input[0], "Softmax")
    scores = softmax and rewrite.source(softmax.input[0], "MatMul")
    return (scores, softmax) if scores else None


def _wide_scores(rewrite: Rewrite, node: Any) -> tuple[Sequence[str], str] | None:
    """[q, rh, rw] and k of a product with relative positions; None for another node."""
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
