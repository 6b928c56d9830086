"""EfficientSAM, as its own code trains it."""

from . import conventions, facts, keys, reference

__all__ = ["conventions", "facts", "keys", "reference"]
