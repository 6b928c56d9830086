"""EfficientSAM, as the public Med-SA code trains it."""

from . import conventions, facts, folded, keys, reference

__all__ = ["conventions", "facts", "folded", "keys", "reference"]
