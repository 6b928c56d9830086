"""Requests → answers of a Triton server over HTTP or gRPC: deadlines, retries, errors.

A request is sent again only if sending it twice changes nothing, and only within its deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import (
    BundleError,
    DeviceError,
    DeviceLostError,
    InputError,
    MedsaError,
    MissingDependencyError,
    UsageError,
    one_line,
)
from medsa_deploy.triton.refusals import error_of

T = TypeVar("T")
SEQUENCE_HEADER = "x-medsa-sequence"
"""Header with the number of a sequence, so that a load balancer can keep it on one server."""
TYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int32": "INT32",
    "float32": "FP32",
    "float64": "FP64",
}
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds before a request is sent again; each pause is twice the one before."""
UNREACHABLE = ("unavailable", "connection", "timed out", "timeout", "refused", "reset", "broken")
"""Words in the errors of a server that did not answer."""


@dataclass(frozen=True, kw_only=True)
class SequencePlace:
    """The place of a request in its sequence."""

    number: int
    starts: bool = False
    ends: bool = False


class LostConnectionError(DeviceError):
    """The server did not answer; the same request may be answered later."""


class Transport:
    """One server. Any number of threads may use it; HTTP has a connection for each thread."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """UsageError for an address of another form, MissingDependencyError without tritonclient.

        `timeout_s`: seconds that a request may take with all attempts.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
            raise UsageError(
                f"the address {url!r} cannot be used: give http://HOST:PORT or grpc://HOST:PORT"
            )
        if timeout_s <= 0:
            raise UsageError(f"timeout_s is {timeout_s:g}, expected more than 0")
        self.url, self.timeout_s = url, timeout_s
        self._grpc = parts.scheme in ("grpc", "grpcs")
        self._secure = parts.scheme in ("https", "grpcs")
        self._address = parts.netloc + ("" if self._grpc else parts.path.rstrip("/"))
        self._client_module = _client_module("grpc" if self._grpc else "http")
        self._of_thread = threading.local()
        self._shared = self._open() if self._grpc else None

    def model_config(self, model: str) -> dict[str, Any]:
        """A model's parameters and tensors; BundleError if the server does not have it."""
        try:
            return self._retried(lambda left: self._config(model, left))
        except InputError as e:
            raise BundleError(
                f"{self.url} serves no {model}: {e}; it has: {', '.join(self._models()) or 'none'}"
            ) from e

    def infer(
        self,
        model: str,
        arrays: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        place: SequencePlace,
        *,
        again: bool,
    ) -> dict[str, NDArray[Any]]:
        """A request's arrays → those of its answer.

        `again`: whether the request may be sent again if no answer came. Errors of the model are
        raised as they were raised there; DeviceError if the server does not answer in time.
        """
        return self._retried(
            lambda left: self._infer(model, arrays, outputs, place, left), again=again
        )

    def close(self) -> None:
        """Close the connections of this thread."""
        client = self._shared or getattr(self._of_thread, "client", None)
        if client is not None:
            with suppress(Exception):
                client.close()
        self._of_thread = threading.local()

    def _retried(self, call: Callable[[float], T], *, again: bool = True) -> T:
        """Call with the seconds that are left, again after a pause while nothing answers."""
        limit, pause = time.monotonic() + self.timeout_s, FIRST_PAUSE
        while True:
            left = limit - time.monotonic()
            try:
                return call(max(left, 0.001))
            except LostConnectionError as e:
                if not again or time.monotonic() + pause >= limit:
                    raise DeviceError(
                        f"{self.url} did not answer within {self.timeout_s:g} s "
                        f"({one_line(e)}): check the server, or connect with a larger timeout_s"
                    ) from e
            self._drop()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _config(self, model: str, left: float) -> dict[str, Any]:
        with self._translated(left):
            if not self._grpc:
                config: dict[str, Any] = self._client().get_model_config(model)
                return config
            answer = self._client().get_model_config(model, as_json=True, client_timeout=left)
            described: dict[str, Any] = answer["config"]
            return described

    def _models(self) -> list[str]:
        """Names of the models that the server has."""
        with suppress(Exception):
            client = self._client()
            if self._grpc:
                index = client.get_model_repository_index(as_json=True).get("models", [])
            else:
                index = client.get_model_repository_index()
            return [entry["name"] for entry in index]
        return []

    def _infer(
        self,
        model: str,
        arrays: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        place: SequencePlace,
        left: float,
    ) -> dict[str, NDArray[Any]]:
        module = self._client_module
        inputs = []
        for name, array in arrays.items():
            tensor = module.InferInput(name, list(array.shape), TYPES[array.dtype.name])
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            inputs.append(tensor)
        options: dict[str, Any] = {
            "inputs": inputs,
            "outputs": [module.InferRequestedOutput(name) for name in outputs],
            "sequence_id": place.number,
            "sequence_start": place.starts,
            "sequence_end": place.ends,
            "headers": {SEQUENCE_HEADER: str(place.number)},
        }
        if self._grpc:
            options["client_timeout"] = left
        with self._translated(left):
            answer = self._client().infer(model, **options)
        return {name: answer.as_numpy(name) for name in outputs}

    @contextmanager
    def _translated(self, left: float) -> Iterator[None]:
        """The block within `left` seconds; its errors as errors of this package."""
        from tritonclient.utils import InferenceServerException

        try:
            with self._deadline(left):
                yield
        except InferenceServerException as e:
            raise _error(str(e.message() or e), str(e.status() or "")) from e
        except MedsaError:
            raise
        except (OSError, ValueError, RuntimeError, HTTPException) as e:  # sockets, broken answers
            raise LostConnectionError(one_line(e)) from e

    @contextmanager
    def _deadline(self, left: float) -> Iterator[None]:
        if self._grpc:
            yield
            return
        import gevent

        with gevent.Timeout(left, LostConnectionError("timed out")):
            yield

    def _client(self) -> Any:
        if self._shared is not None:
            return self._shared
        if not hasattr(self._of_thread, "client"):
            self._of_thread.client = self._open()
        return self._of_thread.client

    def _open(self) -> Any:
        options: dict[str, Any] = {"ssl": self._secure}
        if not self._grpc:
            options |= {"network_timeout": self.timeout_s, "connection_timeout": self.timeout_s}
        return self._client_module.InferenceServerClient(self._address, **options)

    def _drop(self) -> None:
        """Forget this thread's connection, which may be broken; gRPC mends its own."""
        if self._shared is None and hasattr(self._of_thread, "client"):
            with suppress(Exception):
                self._of_thread.client.close()
            del self._of_thread.client


def _client_module(kind: Literal["http", "grpc"]) -> Any:
    try:
        if kind == "grpc":
            import tritonclient.grpc as module
        else:
            import tritonclient.http as module
    except ImportError as e:
        raise MissingDependencyError("tritonclient", extra="remote", purpose="connect") from e
    return module


def _error(text: str, status: str) -> MedsaError:
    """A server's error → an error of this package."""
    if error := error_of(text):
        return error
    words = f"{status} {text}".lower()
    if "must specify the start flag" in words:
        return DeviceLostError(
            "the server no longer has the image: it was restarted, or the image was not used for "
            "too long; encode the image again"
        )
    if "deadline" in words or any(word in words for word in UNREACHABLE):
        return LostConnectionError(one_line(Exception(text)))
    if "unknown model" in words or "is not found" in words or "not ready" in words:
        return InputError(one_line(Exception(text)))
    if "unexpected shape" in words or "data-type" in words or "unexpected inference" in words:
        return UsageError(f"the server refused the request: {one_line(Exception(text))}")
    return DeviceError(f"the server failed: {one_line(Exception(text))}")
