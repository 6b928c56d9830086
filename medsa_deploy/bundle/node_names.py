"""The name of a graph's node ⇄ the network's module that the node belongs to.

Exported nodes and their values are named `MODULE/NODE`, such as
`blocks.3.attention.query/node_MatMul_165`, so that every profiler and viewer shows the module.
Nodes between modules are named `/NODE`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

METADATA = "pkg.torch.onnx.name_scopes"
"""The exporter's metadata key for a node's modules, outermost first, then the operation."""
ADDED = re.compile(
    r"^(\{ForeignNode\[|fused |cast_|InsertedPrecisionFreeCast_|.*_[a-f]{3,6}_[a-f]{3,6}_)+"
)
"""Prefixes that TensorRT, ONNX Runtime, this package and OpenVINO add to a name."""
BETWEEN_MODULES = "rest"
"""The block of nodes between modules."""


def innermost(modules: str) -> str:
    """The innermost module in a value of `METADATA`; empty if the value names none.

    >>> innermost("['', 'blocks', 'blocks.3', 'blocks.3.attention', 'softmax_3']")
    'blocks.3.attention'
    """
    try:
        names = ast.literal_eval(modules)
    except (ValueError, SyntaxError):
        return ""
    module = str(names[-2]) if len(names) > 1 else ""
    return "" if module.startswith("_") else module  # the exporter's own bookkeeping


def node_name(module: str, name: str) -> str:
    """The name of a node in an exported graph."""
    return f"{module}/{name}"


def module_named(name: str) -> str | None:
    """The module in a node's name, without any backend's prefix; None for a name without a module.

    A cast belongs to the module of its input. OpenVINO names a change of layout between A and B
    `A_abcd_acdb_B`: the module is B's. TensorRT names the fusion of all nodes from A to B
    `{ForeignNode[A...B]}`: the module is A's.

    >>> module_named("image_abcd_acdb_patch_embed/node_conv2d/WithoutBiases")
    'patch_embed'
    """
    module, slash, _ = ADDED.sub("", name).partition("/")
    return module if slash else None


def block_of(module: str) -> str:
    """`blocks.3` of `blocks.3.attention.query`; the first part of a name without numbers."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return parts[0] or BETWEEN_MODULES


def kind_of(module: str) -> str:
    """`attention.query` of `blocks.3.attention.query`."""
    block = block_of(module)
    return module.removeprefix(block).removeprefix(".") or block


def module_of(node: Any) -> str:
    """The module of an ONNX node, from its metadata; empty if the metadata names none."""
    entries = (entry.value for entry in node.metadata_props if entry.key == METADATA)
    return next(map(innermost, entries), "")
