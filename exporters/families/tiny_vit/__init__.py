"""TinyViT: mobile_sam and LiteMedSAM."""

from . import conventions, facts, folded, keys, reference

__all__ = ["conventions", "facts", "folded", "keys", "reference"]
