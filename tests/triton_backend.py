"""Triton's module for python models, and a server of them, in this process."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from medsa_deploy.errors import BundleError, DeviceLostError, MedsaError
from medsa_deploy.remote.transport import SequencePlace
from medsa_deploy.triton.refusals import error_of

START, END = 1, 2


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    def message(self) -> str:
        return str(self)


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    def __init__(
        self, arrays: Mapping[str, np.ndarray], outputs: Sequence[str], place: SequencePlace
    ) -> None:
        self._tensors = [Tensor(name, array) for name, array in arrays.items()]
        self._outputs, self._place = outputs, place

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def requested_output_names(self) -> Sequence[str]:
        return self._outputs

    def correlation_id(self) -> int:
        return self._place.number

    def flags(self) -> int:
        return START * self._place.starts + END * self._place.ends


class ModelServer:
    """The python models of a repository, without batches and without a network."""

    def __init__(self, repository: Path, monkeypatch: Any) -> None:
        self.models: dict[str, Any] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.sequences: set[int] = set()
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self._utilities())
        for path in sorted(repository.glob("*/config.pbtxt")):
            config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
            described = json_format.MessageToDict(config, preserving_proto_field_name=True)
            described.setdefault("max_batch_size", 0)
            self.configs[config.name] = described
            self.models[config.name] = self._opened(path.parent, described)

    def close(self) -> None:
        for model in self.models.values():
            model.finalize()

    def transport(self, url: str, *, timeout_s: float) -> Any:
        """In the place of `Transport`."""
        assert urlsplit(url).scheme == "http"
        return Connection(self)

    def execute(
        self,
        model: str,
        arrays: Mapping[str, np.ndarray],
        outputs: Sequence[str] = (),
        place: SequencePlace | None = None,
    ) -> dict[str, np.ndarray]:
        """A model's answer to one request; its error raised as a client raises it."""
        every = [tensor["name"] for tensor in self.configs[model]["output"]]
        request = Request(arrays, outputs or every, place or SequencePlace(number=0))
        (response,) = self.models[model].execute([request])
        if response.has_error():
            raise error_of(str(response.error())) or AssertionError(response.error())
        return {tensor.name(): tensor.as_numpy() for tensor in response.tensors}

    @staticmethod
    def _opened(folder: Path, config: dict[str, Any]) -> Any:
        spec = spec_from_file_location(f"model_{config['name']}", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        arguments = {
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
        }
        model.initialize(arguments)
        return model

    def _utilities(self) -> ModuleType:
        server = self

        class InferenceRequest:
            def __init__(self, **options: Any) -> None:
                self._options = options

            def exec(self) -> InferenceResponse:
                arrays = {t.name(): t.as_numpy() for t in self._options["inputs"]}
                names = self._options["requested_output_names"]
                request = Request(arrays, names, SequencePlace(number=0))
                model = server.models[self._options["model_name"]]
                (response,) = model.execute([request])
                return response

        module = ModuleType("triton_python_backend_utils")
        module.Tensor, module.TritonError = Tensor, TritonError  # type: ignore[attr-defined]
        module.InferenceResponse = InferenceResponse  # type: ignore[attr-defined]
        module.InferenceRequest = InferenceRequest  # type: ignore[attr-defined]
        module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = START  # type: ignore[attr-defined]
        module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = END  # type: ignore[attr-defined]
        module.TRITONSERVER_MEMORY_CPU = 0  # type: ignore[attr-defined]
        module.PreferredMemory = lambda kind: kind  # type: ignore[attr-defined]
        module.get_output_tensor_by_name = lambda response, name: next(  # type: ignore[attr-defined]
            tensor for tensor in response.tensors if tensor.name() == name
        )
        return module


class Connection:
    """A client's connection to a ModelServer; sequences as Triton keeps them."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self.requests = itertools.count()
        self.places: list[SequencePlace] = []

    def model_config(self, model: str) -> dict[str, Any]:
        if model not in self._server.configs:
            raise BundleError(f"no {model}")
        return self._server.configs[model]

    def infer(
        self,
        model: str,
        arrays: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        place: SequencePlace,
        *,
        again: bool,
    ) -> dict[str, np.ndarray]:
        self.places.append(place)
        if place.starts:
            self._server.sequences.add(place.number)
        elif place.number not in self._server.sequences:
            raise DeviceLostError("the server no longer has the image")
        try:
            return self._server.execute(model, arrays, outputs, place)
        except MedsaError:
            raise
        finally:
            if place.ends:
                self._server.sequences.discard(place.number)

    def close(self) -> None:
        """Nothing is open."""
