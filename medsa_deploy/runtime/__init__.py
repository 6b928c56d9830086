"""A bundle, running: encode an image once, decode a mask per prompt. No torch, no builder."""

from .decoding import Embedding
from .loading import load
from .session import Prediction, Session
from .structures import Structure
from .volumes import VolumeOptions, VolumePrediction, segment_volume

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
