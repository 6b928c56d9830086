"""Several backends in order of preference → one backend: the first that opens and runs.

Nothing falls back unless the caller names a chain. Predictions of a later backend are marked.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np

from medsa_deploy.bundle.manifest import Conventions
from medsa_deploy.errors import DeviceError, MedsaError
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.transforms import Frame

from .interface import (
    Array,
    Backend,
    Decoded,
    ImagePart,
    MakesMasks,
    MaskRequest,
    as_split_decoder,
    check_finite,
    require_frame_encoder,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
EMBEDDINGS = "image_embeddings"
"""Key of the embeddings in an image part, beside the outputs of the decoder's first part."""


class FallbackBackend:
    """The first backend of a chain that opens and runs; after a fault the next one, for good.

    It owns the backend in use. One call runs at a time; the others wait. After a fault, an
    embedding that a backend held on a GPU is copied to the next backend if it can be read. If not,
    it is refused with a DeviceError: encode the image again.
    """

    def __init__(self, openers: Sequence[tuple[str, Callable[[], Backend]]]) -> None:
        """`openers`: names of backends, and functions that open them. If none opens, the error of
        the last is raised."""
        self._openers = deque(openers)
        self._owners: WeakSet[object] = WeakSet()
        """Owners of the embeddings that the backend in use holds on a GPU."""
        self._lock = threading.Lock()
        self.name = ""
        """Name of the backend in use."""
        self.degraded: str | None = None
        """Why the first backend of the chain is not in use; None while it is."""
        self._in_use: Backend | None = self._next(None)

    @property
    def _backend(self) -> Backend:
        """The backend in use; DeviceError if none is left."""
        if self._in_use is None and self._openers:  # the one before was interrupted
            self._in_use = self._next(None)
        if self._in_use is None:
            raise DeviceError(f"no backend is left ({self.degraded}): load the bundle again")
        return self._in_use

    def encode(self, image: Array) -> Any:
        """See `Backend.encode`."""
        return self._encode_on_first(lambda backend: (backend.encode(image), None))[0]

    def encode_frame(
        self, frame: Any, conventions: Conventions, window: tuple[float, float] | None
    ) -> tuple[Any, Frame]:
        """See `TakesFrames.encode_frame`; UsageError if the backend in use takes no frames."""
        return self._encode_on_first(
            lambda backend: require_frame_encoder(backend).encode_frame(frame, conventions, window)
        )

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        return self.decode_masks(image_embeddings, point_coords, point_labels, mask, None)[:2]

    def decode_masks(
        self,
        image_embeddings: Any,
        point_coords: Array,
        point_labels: Array,
        mask: Array | None,
        request: MaskRequest | None,
    ) -> Decoded:
        """See `MakesMasks.decode_masks`; None for masks if the backend in use makes none."""
        embeddings = image_embeddings
        prompts = point_coords, point_labels, mask
        with self._lock:
            while True:
                if isinstance(embeddings, DeviceArray) and embeddings.owner not in self._owners:
                    raise DeviceError(
                        f"this image was encoded by a backend that was given up ({self.degraded}): "
                        f"encode it again, for {self.name}"
                    )
                try:
                    backend = self._backend
                    decoded: Decoded
                    if request is not None and isinstance(backend, MakesMasks):
                        decoded = backend.decode_masks(embeddings, *prompts, request)
                    else:
                        decoded = (*backend.decode(embeddings, *prompts), None)
                    check_finite(backend, "masks", *decoded[:2])
                except DeviceError as e:
                    with suppress(Exception):  # the device has just failed; refused below
                        embeddings = np.asarray(embeddings)
                    self._step_down(e)
                else:
                    return decoded

    @property
    def splits(self) -> bool:
        """Whether the backend in use runs the decoder's two parts."""
        return as_split_decoder(self._backend) is not None

    def decode_image(self, image_embeddings: Any) -> ImagePart:
        """See `SplitsDecoder.decode_image`; embeddings are added, for backends without parts."""

        def part(backend: Backend) -> ImagePart:
            split = as_split_decoder(backend)
            if split is None or isinstance(image_embeddings, DeviceArray):
                return {}
            image_part = split.decode_image(image_embeddings)
            check_finite(backend, "an embedding", *image_part.values())
            return image_part

        return {**self._on_first(part), EMBEDDINGS: image_embeddings}

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`; a backend without parts runs the whole decoder."""
        part = dict(image_part)
        embeddings = part.pop(EMBEDDINGS)

        def click(backend: Backend) -> tuple[Array, Array] | None:
            split = as_split_decoder(backend)
            if split is None or not part:
                return None
            outputs = split.decode_click(part, point_coords, point_labels)
            check_finite(backend, "masks", *outputs)
            return outputs

        return self._on_first(click) or self.decode(embeddings, point_coords, point_labels, None)

    def facts(self) -> dict[str, Any]:
        """Facts of the backend in use, and why it is in use."""
        return {**self._backend.facts(), "degraded": self.degraded}

    def close(self) -> None:
        """Release the backend in use."""
        with self._lock:
            if self._in_use is not None:
                self._in_use.close()

    def _encode_on_first(self, encode: Callable[[Backend], tuple[Any, T]]) -> tuple[Any, T]:
        """The embeddings, and another result, of the first backend that does not fail."""

        def checked(backend: Backend) -> tuple[Any, T]:
            embeddings, result = encode(backend)
            check_finite(backend, "an embedding", embeddings)
            if isinstance(embeddings, DeviceArray):
                self._owners.add(embeddings.owner)
            return embeddings, result

        return self._on_first(checked)

    def _on_first(self, call: Callable[[Backend], T]) -> T:
        """The result of `call` on the first backend that does not fail."""
        with self._lock:
            while True:
                try:
                    return call(self._backend)
                except DeviceError as e:
                    self._step_down(e)

    def _step_down(self, error: DeviceError) -> None:
        """Give up the backend in use for the next one; raise `error` if there is none."""
        if not self._openers:
            raise error
        given_up, self._in_use = self._backend, None
        with suppress(MedsaError):
            given_up.close()
        self._owners.clear()
        self._in_use = self._next(f"{given_up.name}: {error}")

    def _next(self, reason: str | None) -> Backend:
        """Open the next backend that can be opened; `reason`: why the last was given up."""
        while True:
            name, open_it = self._openers.popleft()
            if reason is not None:
                self.degraded = f"{self.degraded}; {reason}" if self.degraded else reason
            try:
                backend = open_it()
            except (MedsaError, ImportError, OSError) as e:
                if not self._openers:
                    raise
                reason = f"{name}: {e}"
                continue
            self.name = backend.name
            if self.degraded:
                logger.warning("%s is used, because %s", name, self.degraded)
            return backend
