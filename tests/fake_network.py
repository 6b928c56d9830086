"""A network that is none: its masks are bright pixels, so that geometry can be proved exactly.

Its logits have the size of its input (4·g = S = 60), and volumes whose sides are 4, 12 or 20 are
enlarged to it by odd factors: a voxel's centre stays a pixel's centre, and its value is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Conventions, Manifest, Network, Source
from medsa_deploy.exporters.graphs import contract
from medsa_deploy.runtime import Session
from medsa_deploy.transforms.prompts import BOX_LABELS

GRID, SIDE = 15, 60
SHAPE = (12, 20, 4)
"""Of a volume that can be segmented exactly along any axis."""
SOURCE = Source(checkpoint="none.pth", sha256="0" * 64, container="state dict", dtype="float32")


class BrightPixels:
    """Class k is what is brighter than (k + 1) / (K + 1) of white, but not than the next class's.

    Within the box, if there is one. `clicks`: how much a click adds around itself. `context`: how
    much of its chunk's mean brightness a slice takes on.
    """

    name = "bright pixels"

    def __init__(self, network: Network, *, clicks: float = 0.0, context: float = 0.0) -> None:
        self.network, self.clicks, self.context = network, clicks, context
        self.encoded: list[np.ndarray] = []
        """Images (D, S, S) of every run of the encoder."""
        self.prompts: list[tuple[np.ndarray, np.ndarray]] = []
        """Coordinates (N, 2) and labels (N,) of every prompt set."""

    def encode(self, image: np.ndarray) -> np.ndarray:
        assert len(image) == self.network.chunk
        grey = image[:, 0]
        self.encoded.append(grey)
        grey = grey + np.float32(self.context) * (grey.mean(axis=0) - grey)
        embeddings = np.zeros((len(image), 256, GRID, GRID), np.float32)
        tiles = grey.reshape(-1, GRID, 4, GRID, 4).transpose(0, 2, 4, 1, 3)
        embeddings[:, :16] = tiles.reshape(-1, 16, GRID, GRID)
        return embeddings

    def decode(
        self, embeddings: np.ndarray, coords: np.ndarray, labels: np.ndarray, mask: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        assert len(embeddings) == 1
        tiles = embeddings[0, :16].reshape(4, 4, GRID, GRID).transpose(2, 0, 3, 1)
        masks = [
            self._masks(tiles.reshape(SIDE, SIDE), *prompt)
            for prompt in zip(coords, labels, strict=True)
        ]
        return np.stack(masks), np.ones((len(coords), self.network.masks), np.float32)

    def _masks(self, grey: np.ndarray, coords: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(K, S, S) logits for one prompt set."""
        self.prompts.append((coords, labels))
        k = self.network.masks
        rows, columns = np.mgrid[:SIDE, :SIDE]
        inside = np.ones_like(grey, bool)
        for (x, y), label in zip(coords, labels, strict=True):
            if label == BOX_LABELS[0]:
                inside &= (columns >= x - 0.5) & (rows >= y - 0.5)
            elif label == BOX_LABELS[1]:
                inside &= (columns < x - 0.5) & (rows < y - 0.5)
            elif label >= 0:
                near = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 200)
                grey = grey + np.float32(self.clicks * (1 if label else -1)) * near
        lower = (np.arange(k) + 1)[:, None, None] / (k + 1)
        upper = np.where(lower < k / (k + 1), lower + 1 / (k + 1), np.inf)
        logits = np.minimum(grey - lower, upper - grey)
        return np.where(inside, logits, -1).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        return {"backend": self.name}

    def close(self) -> None:
        pass


def bright_pixels(
    *,
    chunk: int = 1,
    classes: int = 1,
    clicks: float = 0.0,
    context: float = 0.0,
    names: Sequence[str] = (),
    outputs: str = "classes",
    **conventions: Any,
) -> Session:
    """A session on bright pixels: 3D if `chunk` is more than 1; `outputs` sam: of candidates."""
    network = Network(
        family="medsa",
        encoder="vit",
        widths=(64,),
        depths=(1,),
        heads=(1,),
        windows=(14,),
        global_blocks=(0,),
        image_size=SIDE,
        embedding_size=GRID,
        patch_size=4,
        rel_pos="none",
        adapters=("space", "mlp"),
        parameters=1,
        adapter_parameters=0,
        two_way="meta",
        mask_tokens=max(4, classes),
        classes=classes,
        outputs=outputs,
        sd_trans="public" if chunk > 1 else None,
        depth_chunk=chunk if chunk > 1 else None,
    )
    manifest = Manifest(
        source=SOURCE,
        network=network,
        conventions=Conventions(
            **{"preprocess": "medsa", "class_names": tuple(names)} | conventions
        ),
        graphs=contract(network),
        files=(),
    )
    return Session(manifest, BrightPixels(network, clicks=clicks, context=context))
