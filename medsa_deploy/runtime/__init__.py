"""A bundle, running: encode an image once, decode a mask per prompt. No torch, no builder."""

from .session import Embedding, Prediction, Session, load

__all__ = ["Embedding", "Prediction", "Session", "load"]
