"""A node → the module it came from, read from what the exporter wrote beside it."""

from __future__ import annotations

from typing import Any

from medsa_deploy.scopes import METADATA, innermost


def module_of(node: Any) -> str:
    """The module a node came from, `blocks.3.attention.query`; empty where none is named."""
    entries = (entry.value for entry in node.metadata_props if entry.key == METADATA)
    return next(map(innermost, entries), "")
