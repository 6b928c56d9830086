"""Images and prompts → requests to a Triton server; its answers → embeddings and predictions."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Conventions, Manifest, manifest_from_json
from medsa_deploy.errors import BundleError, MedsaError, UsageError
from medsa_deploy.images.image import Image, as_image, check_image, check_values
from medsa_deploy.runtime import Prediction
from medsa_deploy.runtime.volumes.structures import class_names
from medsa_deploy.transforms import Frame
from medsa_deploy.transforms.image import frame_of
from medsa_deploy.transforms.intensities import IntensityWindow, check_not_flat, intensities
from medsa_deploy.triton.python_model import PROTOCOL
from medsa_deploy.triton.tensors import FACT_OUTPUTS, OUTPUTS
from medsa_deploy.triton.wire import image_arrays, prediction_of, prompt_arrays, timings_of

from .transport import SequencePlace, Transport

FACTS = tuple(tensor.name for tensor in FACT_OUTPUTS)
ANSWER = tuple(tensor.name for tensor in OUTPUTS)
MOST_NUMBER = 2**63 - 1


class ServerImage:
    """An image that the server keeps: its sequence, which ends when nothing refers to it."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoteEmbedding:
    """An encoded image, whose values stay on the server.

    When you drop it, the server's memory is freed with the session's next call.
    """

    image: ServerImage
    slice_index: int
    """The place of the slice among those that were encoded together."""
    frame: Frame
    """How the image lies in the network's frame."""
    intensity_window: tuple[float, float] | None
    """Intensities that were mapped to black and white; see `Embedding`."""
    timings_ms: dict[str, float]
    """`preprocess` and `encode` on the server, of a slice its share; `round_trip` of all slices."""


class RemoteSession:
    """A bundle on a server, with `encode`, `encode_slices` and `segment` as a loaded one has them.

    A context manager. Any number of threads may use it. Intensities become display values here, and
    the network runs on the server: masks are those of a `Session` there.

    >>> from medsa_deploy import read_image, remote
    >>> with remote.connect("http://localhost:8000", "liver") as session:
    ...     embedding = session.encode(read_image("slice.png"))
    ...     prediction = session.segment(embedding, points=[(120, 88)])
    >>> prediction.mask.shape
    (240, 320)
    """

    def __init__(self, transport: Transport, model: str, manifest: Manifest) -> None:
        self.manifest = manifest
        self._transport, self._model = transport, model
        self._lock = threading.Lock()
        self._images: dict[int, Any] = {}
        """Numbers of the images that the server keeps → what notices that they were dropped."""
        self._dropped: list[int] = []
        self._is_open = True

    @property
    def conventions(self) -> Conventions:
        """How images and prompts are prepared for this network."""
        return self.manifest.conventions

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that masks are of, in order."""
        return class_names(self.manifest)

    @property
    def image_size(self) -> int:
        """S: the side of the network's square frame, in pixels."""
        return self.manifest.network.image_size

    def encode(
        self, image: Image | ArrayLike, *, intensity_window: IntensityWindow = None
    ) -> RemoteEmbedding:
        """Encode an image on the server; every prompt on it then costs a decoder run only.

        Arguments and errors as for `Session.encode`. DeviceError if the server does not answer in
        time.
        """
        if (chunk := self.manifest.network.chunk) > 1:
            raise UsageError(
                f"this network sees {chunk} neighbouring slices at a time: give its slices to "
                "encode_slices"
            )
        checked = check_image(as_image(image))
        values, window = intensities(checked, self.conventions, intensity_window)
        check_not_flat(checked, values, window)
        return self._encode([values], [window], flat=False)[0]

    def encode_slices(
        self,
        slices: Sequence[Image | ArrayLike],
        *,
        intensity_window: IntensityWindow = None,
    ) -> list[RemoteEmbedding]:
        """Encode neighbouring slices of a volume, all of one size, in one request.

        Arguments and errors as for `Session.encode_slices`.
        """
        chunk = self.manifest.network.chunk
        if not slices or len(slices) % chunk:
            raise UsageError(
                f"{len(slices)} slices were given, expected a multiple of {chunk}: repeat the last "
                "slice to complete a chunk"
            )
        planes, windows = [], []
        for image in slices:
            source = as_image(image)
            checked = check_values(source, str(source.path))
            values, window = intensities(checked, self.conventions, intensity_window)
            planes.append(values)
            windows.append(window)
        return self._encode(planes, windows, flat=True)

    def segment(
        self,
        embedding: RemoteEmbedding,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        multimask: bool = False,
        threshold: float | None = None,
    ) -> Prediction:
        """Masks for prompts, in pixels (x, y) of the image: arguments and errors of
        `Session.segment`.

        DeviceLostError if the server was restarted, and DeviceMemoryError if it dropped the image
        for newer ones: encode the image again. DeviceError if it does not answer in time.
        """
        self._check_open()
        parts = {"points": points, "labels": labels, "box": box, "boxes": boxes, "mask": mask}
        arrays = prompt_arrays(transforms.prompts_for(self.conventions, **parts))
        transforms.mask_rule(self.manifest, threshold)
        if threshold is not None:
            arrays["threshold"] = np.array([threshold], np.float64)
        if multimask:
            arrays["multimask"] = np.array([True])
        arrays["slice"] = np.array([embedding.slice_index], np.int32)
        if embedding.image.number not in self._images:
            raise UsageError("the embedding is of another session: encode the image with this one")
        answer = self._infer(arrays, ANSWER, SequencePlace(number=embedding.image.number))
        return prediction_of(answer, self.manifest, embedding.frame, threshold)

    def close(self) -> None:
        """Free the images on the server, and close the connection; a server that does not answer
        frees them after its idle time."""
        if not self._is_open:
            return
        with self._lock:
            self._dropped += self._images
            for finalizer in self._images.values():
                finalizer.detach()
            self._images = {}
        self._free_dropped()
        self._is_open = False
        self._transport.close()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(
        self,
        planes: Sequence[NDArray[Any]],
        windows: Sequence[tuple[float, float] | None],
        *,
        flat: bool,
    ) -> list[RemoteEmbedding]:
        start = perf_counter()
        arrays = image_arrays(planes, flat=flat)
        number = 1 + secrets.randbelow(MOST_NUMBER)
        answer = self._infer(arrays, FACTS, SequencePlace(number=number, starts=True))
        image = ServerImage(number)
        with self._lock:
            self._images[number] = weakref.finalize(image, self._dropped.append, number)
            self._images[number].atexit = False
        timings = timings_of(answer, ("preprocess", "encode"))
        timings = {name: spent / len(planes) for name, spent in timings.items()}
        timings["round_trip"] = 1e3 * (perf_counter() - start)
        height, width = planes[0].shape[:2]
        frame = frame_of((height, width), self.conventions.preprocess, self.image_size)
        return [
            RemoteEmbedding(
                image=image,
                slice_index=i,
                frame=frame,
                intensity_window=window,
                timings_ms=dict(timings),
            )
            for i, window in enumerate(windows)
        ]

    def _infer(
        self, arrays: dict[str, NDArray[Any]], outputs: Sequence[str], place: SequencePlace
    ) -> dict[str, NDArray[Any]]:
        """A request that may be sent twice: an image starts its sequence anew, prompts change
        nothing."""
        self._check_open()
        self._free_dropped()
        return self._transport.infer(self._model, arrays, outputs, place, again=True)

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError("this session is closed: connect again")

    def _free_dropped(self) -> None:
        """End the sequences of images that nothing refers to; not retried, as idle ones end."""
        while self._dropped:
            number = self._dropped.pop()
            with self._lock:
                self._images.pop(number, None)
            place = SequencePlace(number=number, ends=True)
            with suppress(MedsaError):
                self._transport.infer(self._model, {}, FACTS, place, again=False)


def connect(url: str, name: str, *, timeout_s: float = 60.0) -> RemoteSession:
    """A session on the bundle `name` of the Triton server at `url`.

    `url`: http://HOST:PORT or grpc://HOST:PORT; https and grpcs with TLS. `timeout_s`: seconds that
    a call may take. UsageError for another address, BundleError if the server has no such bundle,
    DeviceError if it does not answer, MissingDependencyError without the extra `remote`.

    >>> from medsa_deploy import remote
    >>> with remote.connect("grpc://localhost:8001", "liver") as session:
    ...     print(session.classes, session.image_size)
    ('mask',) 256
    """
    model = f"{name}_session"
    transport = Transport(url, timeout_s=timeout_s)
    try:
        config = transport.model_config(model)
        parameters = {
            key: value["string_value"] for key, value in config.get("parameters", {}).items()
        }
        protocol = parameters.get("medsa_protocol")
        if protocol != PROTOCOL or "manifest" not in parameters:
            raise BundleError(
                f"{model} at {url} has protocol {protocol}, and this medsa-deploy has protocol "
                f"{PROTOCOL}: install the version that wrote the repository"
            )
        return RemoteSession(transport, model, manifest_from_json(parameters["manifest"]))
    except BaseException:
        transport.close()
        raise
