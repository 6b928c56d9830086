"""A sequence of requests → masks: an image first, then prompts on it. The embedding stays here.

A request that starts a sequence carries an image, and may carry prompts. Requests after it carry
prompts. The end of the sequence frees the embedding, and so does a time without a request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from .embedding_store import EmbeddingStore
from .python_model import ModelSetup, backend_utilities, response
from .tensors import MASK_OUTPUTS
from .wire import (
    encode_request,
    fact_arrays,
    has_prompt,
    prediction_arrays,
    segment_request,
    slice_of,
)

SWEEPS = 4
"""How often in the idle time unused embeddings are looked for."""


class TritonPythonModel:
    """One instance of the model; Triton calls its methods."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Open the bundle; an error keeps the model from being loaded."""
        setup = ModelSetup(arguments)
        self._session = setup.open()
        self._start, self._end = _flags()
        self._store = EmbeddingStore(
            most_bytes=int(setup.parameters["embedding_bytes"]),
            idle_seconds=float(setup.parameters["idle_seconds"]),
        )
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests → answers, in their order."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Close the bundle."""
        self._stop.set()
        self._sweeper.join()
        self._session.close()

    def _respond(self, request: Any) -> Any:
        number, flags = request.correlation_id(), request.flags()
        answer = response(request, lambda arrays: self._answer(request, number, arrays))
        if flags & self._end:
            self._store.remove(number)
        return answer

    def _answer(
        self, request: Any, number: int, arrays: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        starts, ends = (bool(request.flags() & flag) for flag in (self._start, self._end))
        if ends and not arrays:  # frees the embedding, and asks for nothing
            return {
                "image_size": np.zeros(2, np.int32),
                "timings_ms": np.zeros(4, np.float64),
            }
        timings = []
        if starts:
            self._store.remove(number)
            embeddings = encode_request(self._session, arrays)
            self._store.add(number, embeddings)
            timings = [embedding.timings_ms for embedding in embeddings]
            if not self._wants_masks(request, arrays):
                return fact_arrays(embeddings[0].frame, *timings)
        embedding = self._store.find(number, slice_index=slice_of(arrays))
        prediction = segment_request(self._session, embedding, arrays)
        facts = fact_arrays(embedding.frame, *timings, prediction.timings_ms)
        return prediction_arrays(prediction) | facts

    def _wants_masks(self, request: Any, arrays: dict[str, np.ndarray]) -> bool:
        """Whether the first request of a sequence asks for masks, too."""
        names = set(request.requested_output_names())
        if not names & {tensor.name for tensor in MASK_OUTPUTS}:
            return False
        return has_prompt(arrays) or self._session.conventions.prompts != "required"

    def _sweep(self) -> None:
        while not self._stop.wait(self._store.idle_seconds / SWEEPS):
            self._store.remove_idle()


def _flags() -> tuple[int, int]:
    """The flags of a sequence's first and last request."""
    utilities = backend_utilities()
    return (
        int(utilities.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
        int(utilities.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
    )
