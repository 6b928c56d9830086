"""The reference network behind the runtime's backend interface, so that both run the same cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .network import ReferenceNetwork

Array = NDArray[np.float32]


class ReferenceBackend:
    """The checkpoint's own network in PyTorch, float32, on the CPU."""

    name = "pytorch reference"

    def __init__(self, reference: ReferenceNetwork) -> None:
        self._reference = reference

    @torch.inference_mode()
    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        return _array(self._reference.encode(torch.from_numpy(image)))

    @torch.inference_mode()
    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """As the runtime's `Backend.decode`."""
        masks, iou = self._reference.decode(
            torch.from_numpy(image_embeddings),
            torch.from_numpy(point_coords),
            torch.from_numpy(point_labels),
            None if mask is None else torch.from_numpy(mask),
        )
        return _array(masks), _array(iou)

    def facts(self) -> dict[str, Any]:
        """Version and threads."""
        return {
            "backend": self.name,
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def close(self) -> None:
        """Nothing is held beyond the network."""


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.numpy()
    return array
