"""A bundle, running: encode an image once, decode a mask per prompt. No torch, no builder."""

from .backends.registry import BackendName, LoadOptions, Precision
from .decoding import Embedding
from .health import Health
from .loading import load
from .prediction import Prediction
from .session import Session
from .tracker import TrackedFrame, Tracker, TrackerOptions
from .volumes.segment import VolumeOptions, VolumePrediction, segment_volume
from .volumes.structures import Structure

__all__ = [
    "BackendName",
    "Embedding",
    "Health",
    "LoadOptions",
    "Precision",
    "Prediction",
    "Session",
    "Structure",
    "TrackedFrame",
    "Tracker",
    "TrackerOptions",
    "VolumeOptions",
    "VolumePrediction",
    "load",
    "segment_volume",
]
