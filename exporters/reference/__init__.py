"""The reference network: a checkpoint's own network, written to read like its equations."""

from .backend import ReferenceBackend
from .network import ReferenceNetwork, build_reference

__all__ = ["ReferenceBackend", "ReferenceNetwork", "build_reference"]
