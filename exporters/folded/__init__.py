"""The folded network: the reference network as fewer operations, which is what gets exported."""

from .network import FoldedNetwork, fold

__all__ = ["FoldedNetwork", "fold"]
