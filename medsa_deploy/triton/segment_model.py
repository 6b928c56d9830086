"""A request with an image and prompts → masks. Nothing stays here after the answer.

Encoder runs of several requests are joined: they are requests to the encoder's own model, which
batches what arrives from all instances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medsa_deploy.errors import DeviceError, UsageError
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.interface import Array, Backend, ImagePart, as_split_decoder

from .python_model import ModelSetup, backend_utilities, response
from .refusals import error_of
from .wire import encode_request, fact_arrays, prediction_arrays, segment_request, slice_of


class TritonPythonModel:
    """One instance of the model; Triton calls its methods."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Open the bundle; an error keeps the model from being loaded."""
        setup = ModelSetup(arguments)
        self._opened = setup.open()
        self._session = Session(
            self._opened.manifest,
            EncoderModelBackend(setup.parameters["encoder_model"], self._opened.backend),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests → answers, in their order."""
        return [response(request, self._answer) for request in requests]

    def finalize(self) -> None:
        """Close the bundle."""
        self._opened.close()

    def _answer(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        embeddings = encode_request(self._session, arrays)
        place = slice_of(arrays)
        if not 0 <= place < len(embeddings):
            raise UsageError(
                f"slice {place} was prompted, but the image has slices 0 to {len(embeddings) - 1}"
            )
        prediction = segment_request(self._session, embeddings[place], arrays)
        timings = [embedding.timings_ms for embedding in embeddings]
        facts = fact_arrays(embeddings[place].frame, *timings, prediction.timings_ms)
        return prediction_arrays(prediction) | facts


class EncoderModelBackend:
    """A backend whose encoder is a model of the server; its decoder is the bundle's."""

    def __init__(self, model: str, backend: Backend) -> None:
        self.name = backend.name
        self._model, self._backend = model, backend
        self._parts = as_split_decoder(backend)
        self.splits = self._parts is not None

    def encode(self, image: Array) -> Array:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g); DeviceError if the model fails."""
        utilities = backend_utilities()
        answer = utilities.InferenceRequest(
            model_name=self._model,
            requested_output_names=["image_embeddings"],
            inputs=[utilities.Tensor("image", np.ascontiguousarray(image))],
            preferred_memory=utilities.PreferredMemory(utilities.TRITONSERVER_MEMORY_CPU),
        ).exec()
        if answer.has_error():
            text = answer.error().message()
            raise error_of(text) or DeviceError(f"{self._model} failed: {text}")
        tensor = utilities.get_output_tensor_by_name(answer, "image_embeddings")
        return np.array(tensor.as_numpy())  # the server takes its own memory back

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        return self._backend.decode(image_embeddings, point_coords, point_labels, mask)

    def decode_image(self, image_embeddings: Any) -> ImagePart:
        """See `SplitsDecoder.decode_image`."""
        assert self._parts is not None
        return self._parts.decode_image(image_embeddings)

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`."""
        assert self._parts is not None
        return self._parts.decode_click(image_part, point_coords, point_labels)

    def facts(self) -> dict[str, Any]:
        """Version of the backend, and the encoder's model."""
        return self._backend.facts() | {"encoder_model": self._model}

    def close(self) -> None:
        """Nothing: who opened the backend closes it."""
