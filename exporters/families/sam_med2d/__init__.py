"""SAM-Med2D: SAM's ViT with an adapter beside each MLP, over channels and over space."""

from . import facts, folded, keys, reference

__all__ = ["facts", "folded", "keys", "reference"]
