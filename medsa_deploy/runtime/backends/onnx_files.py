"""ONNX files of a bundle → a backend that runs them in a library: ONNX Runtime or OpenVINO.

The library's module says how it opens a file, runs it and times its layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from medsa_deploy.bundle.manifest import GraphContract

from .interface import PARTS, Array, ImagePart, TimedLayer
from .tensor_contract import decoder_inputs, mask_shape

Graph = TypeVar("Graph")
"""A file as the library has it in memory."""


class OnnxFilesBackend(ABC, Generic[Graph]):
    """Encoder, decoder and, if the bundle has them, the decoder's two parts."""

    name: str

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        graphs: Mapping[str, GraphContract],
        *,
        parts: Sequence[Path] = (),
        threads: int | None = None,
        time_layers: bool = False,
    ) -> None:
        """`graphs`: the manifest's. `parts`: both of the split decoder, or none. `threads`: None
        for all cores. BundleError for a file that is not the graph its manifest describes."""
        self.threads, self._time_layers = threads, time_layers
        self._mask_shape = mask_shape(graphs["decoder"])
        self.splits = bool(parts)
        files: dict[str, Path] = {"encoder": encoder, "decoder": decoder}
        if self.splits:
            files |= zip(PARTS, parts, strict=True)
        with ThreadPoolExecutor(len(files)) as pool:  # the decoder's open while the encoder's does
            opened = pool.map(lambda role: self._open(role, files[role], graphs[role]), files)
            self._graphs = dict(zip(files, opened, strict=True))

    @abstractmethod
    def _open(self, role: str, path: Path, contract: GraphContract) -> Graph:
        """Open a file and check that its tensors are the contract's."""

    @abstractmethod
    def _run(self, graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a graph; its outputs by name."""

    @abstractmethod
    def _timed_layers(self, graph: Graph) -> list[TimedLayer]:
        """The layers of a graph that was opened to time them."""

    def encode(self, image: Array) -> Any:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        return self._run(self._graphs["encoder"], {"image": image})["image_embeddings"]

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        inputs = decoder_inputs(
            image_embeddings, point_coords, point_labels, mask, self._mask_shape
        )
        return self._masks("decoder", inputs)

    def decode_image(self, image_embeddings: Any) -> ImagePart:
        """See `SplitsDecoder.decode_image`."""
        return self._run(self._graphs[PARTS[0]], {"image_embeddings": image_embeddings})

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`."""
        prompts = {"point_coords": point_coords, "point_labels": point_labels}
        return self._masks(PARTS[1], {**image_part, **prompts})

    def layers(self) -> dict[str, list[TimedLayer]]:
        """See `TimesLayers.layers`; empty if not opened for it."""
        if not self._time_layers:
            return {}
        by_role = {role: self._timed_layers(graph) for role, graph in self._graphs.items()}
        return {role: layers for role, layers in by_role.items() if layers}

    def close(self) -> None:
        """Release the graphs."""
        self._graphs.clear()

    def _masks(self, role: str, inputs: dict[str, Array]) -> tuple[Array, Array]:
        outputs = self._run(self._graphs[role], inputs)
        return outputs["low_res_masks"], outputs["iou_predictions"]
