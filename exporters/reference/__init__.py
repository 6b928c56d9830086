"""The reference network: a checkpoint's own network, written to read like its equations.

Encoders are in `families/`; the decoder and the neck that families share are here.
"""

from .backend import ReferenceBackend
from .network import ReferenceNetwork

__all__ = ["ReferenceBackend", "ReferenceNetwork"]
