"""A bundle, running: encode an image once, decode a mask per prompt. No torch, no builder."""

from .decoding import Embedding
from .loading import load
from .session import Prediction, Session
from .volumes.segment import VolumeOptions, VolumePrediction, segment_volume
from .volumes.structures import Structure

__all__ = [
    "Embedding",
    "Prediction",
    "Session",
    "Structure",
    "VolumeOptions",
    "VolumePrediction",
    "load",
    "segment_volume",
]
