"""What the python models share: the bundle that they run, requests and answers, errors.

Triton's python backend gives a model's process a module of its own, `triton_python_backend_utils`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import read_manifest
from medsa_deploy.errors import BundleError, DeviceError, UsageError, about
from medsa_deploy.runtime import Session, load

from .refusals import error_text

logger = logging.getLogger(__name__)

PROTOCOL = "1"
"""Version of the tensors and parameters; another one is refused."""


def backend_utilities() -> Any:
    """Triton's module for python models; it exists only in a model's process."""
    return import_module("triton_python_backend_utils")


class ModelSetup:
    """What a model's configuration says."""

    def __init__(self, arguments: Mapping[str, str]) -> None:
        """`arguments`: as Triton calls `initialize`. UsageError for another protocol."""
        self.config: dict[str, Any] = json.loads(arguments["model_config"])
        self.parameters: dict[str, str] = {
            key: value["string_value"] for key, value in self.config["parameters"].items()
        }
        protocol = self.parameters.get("medsa_protocol")
        if protocol != PROTOCOL:
            raise UsageError(
                f"{self.config['name']} was written for protocol {protocol}, and the installed "
                f"medsa-deploy has protocol {PROTOCOL}: write the repository again with it"
            )
        version = arguments["model_version"]
        self.bundle = Path(arguments["model_repository"], version, self.parameters["bundle"])

    @property
    def threads(self) -> int:
        """Threads of one instance: the cores, shared among the instances of this machine."""
        instances: int = sum(group["count"] for group in self.config["instance_group"])
        return max(1, len(os.sched_getaffinity(0)) // instances)

    def open(self) -> Session:
        """A session on the bundle; BundleError unless it is the one of the configuration."""
        with about(self.bundle):
            digest = read_manifest(self.bundle)[1]
            if digest != self.parameters["bundle_sha256"]:
                raise BundleError(
                    f"{self.bundle} changed since the repository was written: its manifest has the "
                    f"SHA-256 {digest}, expected {self.parameters['bundle_sha256']}: write the "
                    "repository again with medsa-deploy triton"
                )
            return load(
                self.bundle,
                backend=self.parameters["runtime"],  # type: ignore[arg-type]
                precision=self.parameters["precision"],  # type: ignore[arg-type]
                threads=self.threads if self.parameters["runtime"] == "onnxruntime" else None,
            )


def request_arrays(request: Any) -> dict[str, np.ndarray]:
    """A request's inputs by name; DeviceError if this numpy cannot read them."""
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    if not all(array.flags.c_contiguous for array in arrays.values()):
        # older stubs read the sizes of types where NumPy 2 has something else
        raise DeviceError(
            f"this server's python backend cannot be used with NumPy {np.__version__}: install "
            "numpy<2 where the server runs, or a newer Triton"
        )
    return arrays


def response(
    request: Any, compute: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
) -> Any:
    """A request → the outputs it asks for, of what is computed from its arrays; or the error."""
    utilities = backend_utilities()
    try:
        answer = compute(request_arrays(request))
    except Exception as e:
        if not hasattr(e, "exit_code"):
            logger.exception("a request failed")
        return utilities.InferenceResponse(
            output_tensors=[], error=utilities.TritonError(error_text(e))
        )
    names = request.requested_output_names()
    return utilities.InferenceResponse(
        output_tensors=[
            utilities.Tensor(name, array) for name, array in answer.items() if name in names
        ]
    )
