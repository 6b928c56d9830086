"""nnInteractive's own client, connected to a server with an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

from medsa_deploy.serve.server import Server

SPACING = (3.0, 0.8, 0.9)


def connected(
    server: Server, array: np.ndarray, path: str = "", spacing: Sequence[float] = SPACING
) -> nnInteractiveRemoteInferenceSession:
    """A client with the image, and its buffer of zeros."""
    client = nnInteractiveRemoteInferenceSession(server.url + path)
    client.set_image(array[None], {"spacing": np.array(spacing)})
    client.set_target_buffer(np.zeros(array.shape, np.uint8))
    return client
