"""A backend that notes what it is given, and prompts for a small image."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsa_deploy.runtime import Prediction

HEIGHT, WIDTH = 120, 160
POINTS = np.array([[[30.0, 40.0]], [[100.5, 20.0]], [[159.0, 119.0]]])
BOXES = np.array([[10.0, 20, 90, 100], [0, 0, 160, 120], [60.5, 30, 61.5, 90]])
FOUR_BY_FOUR = np.arange(16, dtype=np.uint8).reshape(4, 4)


class FakeBackend:
    """Notes what it is given; answers with one value everywhere."""

    name = "fake"

    def __init__(self, network: Any, *, embedding: float = 1.0, logit: float = 1.0) -> None:
        self.network, self.embedding, self.logit = network, embedding, logit
        self.images: list[np.ndarray] = []
        self.prompts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def encode(self, image: np.ndarray) -> np.ndarray:
        self.images.append(image)
        g = self.network.embedding_size
        return np.full((1, 256, g, g), self.embedding, np.float32)

    def decode(self, embeddings, coords, labels, mask) -> tuple[np.ndarray, np.ndarray]:
        self.prompts.append((coords, labels, mask))
        side, k, p = 4 * self.network.embedding_size, self.network.masks, len(coords)
        masks = np.full((p, k, side, side), self.logit, np.float32)
        return masks, np.full((p, k), 0.5, np.float32)

    def facts(self) -> dict[str, Any]:
        return {"backend": self.name}

    def close(self) -> None:
        pass


def full_size(values: np.ndarray) -> np.ndarray:
    """(4, 4) → (256, 256), the network's own size, so that nothing is resampled."""
    return values.repeat(64, axis=0).repeat(64, axis=1)


def assert_same(prediction: Prediction, other: Prediction) -> None:
    """Equal up to rounding, which may move a logit that is almost 0 across it."""
    np.testing.assert_allclose(
        prediction.low_res_logits, other.low_res_logits, atol=1e-5, rtol=1e-5
    )
    np.testing.assert_allclose(prediction.scores, other.scores, atol=1e-5)
    assert prediction.masks.shape == other.masks.shape
    assert (prediction.masks != other.masks).mean() <= 1e-4
