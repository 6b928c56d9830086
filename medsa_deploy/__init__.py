"""medsa-deploy: a trained Medical SAM Adapter checkpoint → masks on a scanner.

>>> from medsa_deploy import load, read_image
>>> with load("liver.medsa") as session:
...     embedding = session.encode(read_image("slice.png"))  # once per image
...     prediction = session.segment(embedding, points=[(120, 88)])  # once per prompt
>>> prediction.mask.shape
(240, 320)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors as errors

if TYPE_CHECKING:
    from .images import Image as Image
    from .images import Volume as Volume
    from .images import read_image as read_image
    from .images import read_volume as read_volume
    from .images import write_segmentation as write_segmentation
    from .kernels.postprocess import Region as Region
    from .nvidia.device_array import DeviceArray as DeviceArray
    from .runtime import BackendName as BackendName
    from .runtime import Embedding as Embedding
    from .runtime import LoadOptions as LoadOptions
    from .runtime import Precision as Precision
    from .runtime import Prediction as Prediction
    from .runtime import Session as Session
    from .runtime import Structure as Structure
    from .runtime import TrackedFrame as TrackedFrame
    from .runtime import Tracker as Tracker
    from .runtime import TrackerOptions as TrackerOptions
    from .runtime import VolumeOptions as VolumeOptions
    from .runtime import VolumePrediction as VolumePrediction
    from .runtime import load as load
    from .runtime import segment_volume as segment_volume
    from .runtime.backends.registry import backends as backends

# ONNX Runtime reports to its vendor and writes into the home folder, unless its user decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
"""The version of this package.

>>> import medsa_deploy
>>> major, minor, patch = medsa_deploy.__version__.split(".")
"""

_HOMES = {
    "BackendName": ".runtime",
    "DeviceArray": ".nvidia.device_array",
    "Embedding": ".runtime",
    "Image": ".images",
    "LoadOptions": ".runtime",
    "Precision": ".runtime",
    "Prediction": ".runtime",
    "Region": ".kernels.postprocess",
    "Session": ".runtime",
    "Structure": ".runtime",
    "TrackedFrame": ".runtime",
    "Tracker": ".runtime",
    "TrackerOptions": ".runtime",
    "Volume": ".images",
    "VolumeOptions": ".runtime",
    "VolumePrediction": ".runtime",
    "backends": ".runtime.backends.registry",
    "load": ".runtime",
    "read_image": ".images",
    "read_volume": ".images",
    "segment_volume": ".runtime",
    "write_segmentation": ".images",
}
"""Public name → the module it is imported from."""

__all__ = ["__version__", "errors", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use, so that importing this package costs numpy only."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
