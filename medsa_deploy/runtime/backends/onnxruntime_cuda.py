"""ONNX files → masks by ONNX Runtime's CUDA provider, with embeddings that stay on the GPU."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

from medsa_deploy.bundle.manifest import GraphContract
from medsa_deploy.errors import EngineDeviceError, MissingDependencyError
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.device_array import FLOAT32, DeviceArray

from .interface import Array, TimedLayer
from .onnxruntime_cpu import NO_CUDA, OnnxRuntimeBackend, failure
from .tensor_contract import decoder_inputs


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Encoder and decoder in ONNX Runtime's CUDA provider, on the first GPU.

    Float32 products are not computed in TF32. An embedding owns its memory there.
    """

    name = "onnxruntime-cuda"
    device = "cuda"
    provider = "CUDAExecutionProvider"
    providers = (("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"}),)
    slower_fusions = ""

    def __init__(
        self, encoder: Path, decoder: Path, graphs: Mapping[str, GraphContract], **options: Any
    ) -> None:
        """See `OnnxRuntimeBackend`. MissingDependencyError for a build of ONNX Runtime without
        CUDA, EngineDeviceError if its CUDA finds no GPU or libraries."""
        if self.provider not in ort.get_available_providers():
            raise MissingDependencyError(
                "onnxruntime-gpu", extra="gpu", purpose=f"the backend {self.name}"
            )
        if hasattr(ort, "preload_dlls"):  # CUDA's libraries as Python packages
            with contextlib.redirect_stdout(io.StringIO()):  # it prints those it does not find
                ort.preload_dlls()
        untimed = options | {"time_layers": False}
        super().__init__(encoder, decoder, graphs, **untimed)
        for session in self._graphs.values():
            session.disable_fallback()  # a fault would quietly move it to the CPU
        if any(self.provider not in s.get_providers() for s in self._graphs.values()):
            self.close()
            raise EngineDeviceError(NO_CUDA)

    def encode(self, image: Array) -> Any:
        """image (B, 3, S, S) on the host → image_embeddings (B, 256, g, g) on the GPU."""
        (value,) = self._bound(self._graphs["encoder"], {"image": image}, self.device)

        def read(address: int, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            start = (address - value.data_ptr()) // FLOAT32
            values: Array = value.numpy().reshape(-1)[start : start + int(np.prod(shape))]
            return values.reshape(shape)

        return DeviceArray(value.data_ptr(), tuple(value.shape()), value, read)

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`; embeddings are this backend's own, or on the host."""
        inputs = decoder_inputs(
            image_embeddings, point_coords, point_labels, mask, self._mask_shape
        )
        masks, iou = self._bound(self._graphs["decoder"], inputs, "cpu")
        return masks.numpy(), iou.numpy()

    def layers(self) -> dict[str, list[TimedLayer]]:
        """Empty: ONNX Runtime times the launches of a layer's kernels, not the kernels."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Version, providers, threads and GPU."""
        gpu = cuda.device()
        return {**super().facts(), "device": gpu.name if gpu else None}

    def _bound(self, session: ort.InferenceSession, inputs: dict[str, Any], device: str) -> Any:
        """Run a graph; its outputs as ONNX Runtime's own values, on `device`."""
        try:
            binding = session.io_binding()
            for name, values in inputs.items():
                if isinstance(values, DeviceArray) and isinstance(values.owner, ort.OrtValue):
                    place = (self.device, 0, np.float32, values.shape, values.address)
                    binding.bind_input(name, *place)
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(values))
            for output in session.get_outputs():
                binding.bind_output(output.name, device)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding.get_outputs()
        except Exception as e:  # onnxruntime raises classes of its own that share no base
            raise failure(e) from e
