"""A node → the block and the kind of layer it belongs to, read from the module that exported it."""

from __future__ import annotations

import ast
from typing import Any

from .files import KEPT_METADATA

REST = "rest"
"""Nodes between modules."""


def module_of(node: Any) -> str:
    """The module a node came from, such as `blocks.3.attention.query`; empty where none is named.

    The exporter lists the modules around a node, outermost first, and then the operation.
    """
    for entry in node.metadata_props:
        if entry.key == KEPT_METADATA:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return ""
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


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
