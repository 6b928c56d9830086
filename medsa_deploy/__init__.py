"""medsa-deploy: a trained Medical SAM Adapter checkpoint, as masks on a scanner.

from medsa_deploy import load

with load("liver.medsa") as session:
    embedding = session.encode(image)
    prediction = session.segment(embedding, points=[(120, 88)])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors as errors

if TYPE_CHECKING:
    from .images import Image as Image
    from .images import Volume as Volume
    from .images import read_image as read_image
    from .images import read_volume as read_volume
    from .images import write_segmentation as write_segmentation
    from .runtime import Embedding as Embedding
    from .runtime import Prediction as Prediction
    from .runtime import Session as Session
    from .runtime import Structure as Structure
    from .runtime import VolumeOptions as VolumeOptions
    from .runtime import VolumePrediction as VolumePrediction
    from .runtime import load as load
    from .runtime import segment_volume as segment_volume

__version__ = "0.1.0"

_HOMES = {
    "Embedding": ".runtime",
    "Image": ".images",
    "Prediction": ".runtime",
    "Session": ".runtime",
    "Structure": ".runtime",
    "Volume": ".images",
    "VolumeOptions": ".runtime",
    "VolumePrediction": ".runtime",
    "load": ".runtime",
    "read_image": ".images",
    "read_volume": ".images",
    "segment_volume": ".runtime",
    "write_segmentation": ".images",
}

__all__ = ["__version__", "errors", *_HOMES]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for, so that this package loads fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
