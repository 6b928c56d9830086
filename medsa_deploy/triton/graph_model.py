"""Requests for the encoder or the whole decoder → its outputs, requests joined to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .python_model import ModelSetup, backend_utilities, request_arrays, response


class TritonPythonModel:
    """One instance of the model; Triton calls its methods."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Open the bundle; an error keeps the model from being loaded."""
        setup = ModelSetup(arguments)
        self._session = setup.open()
        self._role = setup.parameters["role"]
        self._batches = setup.config["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests → answers, in their order; those that cannot be joined run one by one."""
        if self._batches and len(requests) > 1:
            try:
                return self._joined(requests)
            except Exception:  # one request fails the batch: each gets its own answer below
                return [response(request, self._run) for request in requests]
        return [response(request, self._run) for request in requests]

    def finalize(self) -> None:
        """Close the bundle."""
        self._session.close()

    def _joined(self, requests: Sequence[Any]) -> list[Any]:
        inputs = [request_arrays(request) for request in requests]
        outputs = self._run(
            {name: np.concatenate([arrays[name] for arrays in inputs]) for name in inputs[0]}
        )
        ends = np.cumsum([len(next(iter(arrays.values()))) for arrays in inputs])
        utilities = backend_utilities()
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [
            utilities.InferenceResponse(
                output_tensors=[
                    utilities.Tensor(name, np.ascontiguousarray(split[i]))
                    for name, split in parts.items()
                ]
            )
            for i in range(len(requests))
        ]

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        backend = self._session.backend
        if self._role == "encoder":
            return {"image_embeddings": np.asarray(backend.encode(inputs["image"]))}
        mask = inputs.get("mask_input")
        if "has_mask_input" in inputs and not inputs["has_mask_input"].any():
            mask = None
        logits, scores = backend.decode(
            inputs["image_embeddings"], inputs["point_coords"], inputs["point_labels"], mask
        )
        return {"low_res_masks": logits, "iou_predictions": scores}
