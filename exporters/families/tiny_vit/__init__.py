"""TinyViT: mobile_sam and LiteMedSAM."""

from . import facts, folded, keys, reference

__all__ = ["facts", "folded", "keys", "reference"]
