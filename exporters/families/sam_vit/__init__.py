"""SAM's ViT, with or without Med-SA's adapters."""

from . import facts, folded, keys, reference

__all__ = ["facts", "folded", "keys", "reference"]
