"""A node of a graph ⇄ the module of the network it came from.

Exported nodes and the values they make are named `MODULE/NODE`, such as
`blocks.3.attention.query/node_MatMul_165`, so that every profiler and viewer shows what it is
about; between modules they are named `/NODE`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

METADATA = "pkg.torch.onnx.name_scopes"
"""Where the exporter says which modules a node came from, outermost first, then the operation."""
ADDED = re.compile(
    r"^(\{ForeignNode\[|fused |cast_|InsertedPrecisionFreeCast_|.*_[a-f]{3,6}_[a-f]{3,6}_)+"
)
"""What TensorRT, ONNX Runtime, this package and OpenVINO put before a name."""
REST = "rest"
"""Nodes between modules."""


def innermost(scopes: str) -> str:
    """The module in a value of `METADATA`, `blocks.3.attention.query`; empty where none is named.

    >>> innermost("['', 'blocks', 'blocks.3', 'blocks.3.attention', 'softmax_3']")
    'blocks.3.attention'
    """
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    found = str(names[-2]) if len(names) > 1 else ""
    return "" if found.startswith("_") else found  # the exporter's own bookkeeping


def node_name(module: str, name: str) -> str:
    """What a node is called in an exported graph."""
    return f"{module}/{name}"


def module_named(name: str) -> str | None:
    """The module in a node's name, whatever a backend added to it; None in a name without one.

    Casts are named after what they cast. OpenVINO calls a change of layout `A_abcd_acdb_B`, between
    A and B, of which this takes B. TensorRT calls all nodes from A to B, made one,
    `{ForeignNode[A...B]}`, of which this takes A.

    >>> module_named("image_abcd_acdb_patch_embed/node_conv2d/WithoutBiases")
    'patch_embed'
    """
    module, slash, _ = ADDED.sub("", name).partition("/")
    return module if slash else None


def block_of(module: str) -> str:
    """`blocks.3` of `blocks.3.attention.query`; the first name where nothing is numbered."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return parts[0] or REST


def kind_of(module: str) -> str:
    """`attention.query` of `blocks.3.attention.query`."""
    block = block_of(module)
    return module.removeprefix(block).removeprefix(".") or block


def module_of(node: Any) -> str:
    """The module a node came from, `blocks.3.attention.query`; empty where none is named."""
    entries = (entry.value for entry in node.metadata_props if entry.key == METADATA)
    return next(map(innermost, entries), "")
