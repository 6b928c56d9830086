"""A backend that segments what is bright inside a box: cheap, and its masks are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Manifest

LOGIT = 8.0


class BlobBackend:
    """Notes prompts; the mask is the bright pixels of the image within the prompt's box.

    Points prompt the whole frame. The embedding carries the image at the size of the logits.
    """

    name = "blobs"

    def __init__(self, manifest: Manifest) -> None:
        self.network = manifest.network
        self.side = 4 * manifest.network.embedding_size
        self.score = 0.9
        self.encoded = 0
        self.prompts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The image's first channel, each pixel of the logits' size in one value."""
        self.encoded += 1
        step, g = image.shape[-1] // self.side, self.network.embedding_size
        values = np.zeros((len(image), 256 * g * g), np.float32)
        small = image[:, 0, step // 2 :: step, step // 2 :: step]
        values[:, : self.side**2] = small.reshape(len(image), -1)
        return values.reshape(len(image), 256, g, g)

    def decode(self, embeddings: Any, coords: Any, labels: Any, mask: Any) -> Any:
        """Logits and scores of one prompt set."""
        self.prompts.append((coords, labels, mask))
        bright = embeddings.reshape(-1)[: self.side**2].reshape(self.side, self.side)
        inside = np.zeros_like(bright, dtype=bool)
        corners = coords[0][labels[0] >= 2] / (self.network.image_size / self.side)
        x0, y0, x1, y1 = corners.ravel() if len(corners) else (0, 0, self.side, self.side)
        inside[round(y0) : round(y1), round(x0) : round(x1)] = True
        logits = np.where((bright > bright.mean()) & inside, LOGIT, -LOGIT).astype(np.float32)
        shape = (1, self.network.masks, self.side, self.side)
        scores = np.full(shape[:2], self.score, np.float32)
        return np.broadcast_to(logits, shape).copy(), scores

    def facts(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"backend": self.name}

    def close(self) -> None:
        """There is nothing to release."""
