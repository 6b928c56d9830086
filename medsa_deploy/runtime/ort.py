"""ONNX Runtime on the CPU: the backend that every install has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from medsa_deploy.errors import BundleError, DeviceError
from medsa_deploy.manifest import Graph

from .backend import Array

DTYPES = {"tensor(float)": "float32"}
"""ONNX Runtime's names of the contract's types."""


class OnnxRuntimeBackend:
    """The two graphs of a bundle as ONNX Runtime sessions."""

    name = "onnxruntime"

    def __init__(
        self, encoder: Path, decoder: Path, graphs: dict[str, Graph], *, threads: int | None = None
    ) -> None:
        self.threads = threads
        self._mask_shape = _shape_of(graphs["decoder"], "mask_input")
        """Of one set, (1, 4g, 4g); None for a decoder without mask prompts."""
        self._encoder = self._open(encoder, graphs["encoder"])
        self._decoder = self._open(decoder, graphs["decoder"])

    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        (embeddings,) = self._run(self._encoder, {"image": image})
        return embeddings.copy()  # or, kept, they hold up the memory of the encoder's next runs

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        inputs = {
            "image_embeddings": image_embeddings,
            "point_coords": point_coords,
            "point_labels": point_labels,
        }
        if self._mask_shape is not None:
            nothing = np.zeros((len(point_coords), *self._mask_shape), np.float32)
            inputs["mask_input"] = nothing if mask is None else mask
            inputs["has_mask_input"] = np.array([mask is not None], np.float32)
        masks, iou = self._run(self._decoder, inputs)
        return masks, iou

    def facts(self) -> dict[str, Any]:
        """Version, provider and threads."""
        return {
            "backend": self.name,
            "version": ort.__version__,
            "providers": self._encoder.get_providers(),
            "threads": self.threads or "all",
        }

    def close(self) -> None:
        """Release both sessions."""
        del self._encoder, self._decoder

    def _open(self, path: Path, graph: Graph) -> ort.InferenceSession:
        """A session whose tensors are the contract's."""
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures are raised; the log would say them twice
        # A plan of the first run's memory, made for the second, is memory once more: without it a
        # chunk of 4 slices at 1024 takes 1.4 GB instead of 2.8, in the same time.
        options.enable_mem_pattern = False
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            raise BundleError(f"{path} is not a graph ONNX Runtime can load: {_line(e)}") from e
        _check_contract(path, session, graph)
        return session

    def _run(self, session: ort.InferenceSession, inputs: dict[str, Array]) -> list[Array]:
        try:
            outputs: list[Array] = session.run(None, inputs)
        except Exception as e:  # as above
            raise DeviceError(f"ONNX Runtime failed: {_line(e)}") from e
        return outputs


def _check_contract(path: Path, session: ort.InferenceSession, graph: Graph) -> None:
    """BundleError unless the file's tensors have the manifest's names, types and fixed axes."""
    opened = (*session.get_inputs(), *session.get_outputs())
    described = (*graph.inputs, *graph.outputs)
    found = {t.name: f"{DTYPES.get(t.type, t.type)} {_axes(t.shape)}" for t in opened}
    wanted = {t.name: f"{t.dtype} {_axes(t.shape)}" for t in described}
    differing = [
        f"{name} is {found.get(name, 'absent')}, the manifest says {wanted.get(name, 'absent')}"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise BundleError(
            f"{path} is not the graph its manifest describes: {'; '.join(differing)}: "
            "export the checkpoint again"
        )


def _axes(shape: Sequence[int | str | None]) -> str:
    """A shape in words; a dynamic axis is *, whatever its name."""
    return f"({', '.join(str(axis) if isinstance(axis, int) else '*' for axis in shape)})"


def _shape_of(graph: Graph, name: str) -> tuple[int, ...] | None:
    """The fixed axes of one input; None if there is none of that name."""
    shapes = (t.shape for t in graph.inputs if t.name == name)
    return next((tuple(axis for axis in s if isinstance(axis, int)) for s in shapes), None)


def _line(error: BaseException) -> str:
    """The first line of what ONNX Runtime said; its type where it said nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
