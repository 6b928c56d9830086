"""ONNX Runtime on the CPU: the backend that every install has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from medsa_deploy.errors import BundleError, DeviceError
from medsa_deploy.manifest import Graph

from .backend import Array
from .contract import check_contract, decoder_inputs, mask_shape

DTYPES = {"tensor(float)": "float32"}
"""ONNX Runtime's names of the contract's types."""


class OnnxRuntimeBackend:
    """The two graphs of a bundle as ONNX Runtime sessions."""

    name = "onnxruntime"

    def __init__(
        self, encoder: Path, decoder: Path, graphs: dict[str, Graph], *, threads: int | None = None
    ) -> None:
        self.threads = threads
        self._mask_shape = mask_shape(graphs["decoder"])
        self._encoder = self._open(encoder, graphs["encoder"])
        self._decoder = self._open(decoder, graphs["decoder"])

    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        (embeddings,) = self._run(self._encoder, {"image": image})
        return embeddings

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        inputs = decoder_inputs(
            image_embeddings, point_coords, point_labels, mask, self._mask_shape
        )
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
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            raise BundleError(f"{path} is not a graph ONNX Runtime can load: {_line(e)}") from e
        tensors = (*session.get_inputs(), *session.get_outputs())
        opened = [(t.name, DTYPES.get(t.type, t.type), t.shape) for t in tensors]
        check_contract(path, opened, graph)
        return session

    def _run(self, session: ort.InferenceSession, inputs: dict[str, Array]) -> list[Array]:
        try:
            outputs: list[Array] = session.run(None, inputs)
        except Exception as e:  # as above
            raise DeviceError(f"ONNX Runtime failed: {_line(e)}") from e
        return outputs


def _line(error: BaseException) -> str:
    """The first line of what ONNX Runtime said; its type where it said nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
