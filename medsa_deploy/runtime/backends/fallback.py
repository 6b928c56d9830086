"""Backends in the order they are wanted → one backend: the first that works, while it does.

Nothing falls back unless the caller names a chain, and what a later backend gives is marked.
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
from medsa_deploy.nvidia.cuda import DeviceArray
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
"""What an image part holds beside what the decoder's first part gives."""


class FallbackBackend:
    """The first backend of a chain that opens and runs; a fault moves on to the next, for good.

    Owns the backend in use. One call runs at a time. An embedding that a backend held on a GPU is
    brought along if it can be read; else it is refused by name: encode the image again.
    """

    def __init__(self, openers: Sequence[tuple[str, Callable[[], Backend]]]) -> None:
        """`openers`: names of backends, and what opens them. Their last error where none does."""
        self._openers = deque(openers)
        self._owners: WeakSet[object] = WeakSet()
        """Of the embeddings that the backend in use holds on a GPU."""
        self._lock = threading.Lock()
        self.name = ""
        """Of the backend in use."""
        self.degraded: str | None = None
        """Why the first backend of the chain is not in use; None while it is."""
        self._in_use: Backend | None = self._next(None)

    @property
    def _backend(self) -> Backend:
        """The backend in use; DeviceError once none is left."""
        if self._in_use is None and self._openers:  # the one before was interrupted
            self._in_use = self._next(None)
        if self._in_use is None:
            raise DeviceError(f"no backend is left ({self.degraded}): load the bundle again")
        return self._in_use

    def encode(self, image: Array) -> Any:
        """See `Backend.encode`."""
        return self._encoded(lambda backend: (backend.encode(image), None))[0]

    def encode_frame(
        self, frame: Any, conventions: Conventions, window: tuple[float, float] | None
    ) -> tuple[Any, Frame]:
        """See `TakesFrames.encode_frame`; UsageError where the backend in use takes none."""
        return self._encoded(
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
        wanted: MaskRequest | None,
    ) -> Decoded:
        """See `MakesMasks.decode_masks`; no masks where the backend in use makes none."""
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
                    found: Decoded
                    if wanted is not None and isinstance(backend, MakesMasks):
                        found = backend.decode_masks(embeddings, *prompts, wanted)
                    else:
                        found = (*backend.decode(embeddings, *prompts), None)
                    check_finite(backend, "masks", *found[:2])
                except DeviceError as e:
                    with suppress(Exception):  # from what has just failed; refused below
                        embeddings = np.asarray(embeddings)
                    self._step_down(e)
                else:
                    return found

    @property
    def splits(self) -> bool:
        """Whether the backend in use runs the decoder's two parts."""
        return as_split_decoder(self._backend) is not None

    def decode_image(self, image_embeddings: Array) -> ImagePart:
        """See `SplitsDecoder.decode_image`; embeddings go along, for a backend without parts."""

        def part(backend: Backend) -> ImagePart:
            split = as_split_decoder(backend)
            if split is None or isinstance(image_embeddings, DeviceArray):
                return {}
            found = split.decode_image(image_embeddings)
            check_finite(backend, "an embedding", *found.values())
            return found

        return {**self._tried(part), EMBEDDINGS: image_embeddings}

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """See `SplitsDecoder.decode_click`; by the whole decoder where the backend has no parts."""
        part = dict(image_part)
        embeddings = part.pop(EMBEDDINGS)

        def click(backend: Backend) -> tuple[Array, Array] | None:
            split = as_split_decoder(backend)
            if split is None or not part:
                return None
            found = split.decode_click(part, point_coords, point_labels)
            check_finite(backend, "masks", *found)
            return found

        return self._tried(click) or self.decode(embeddings, point_coords, point_labels, None)

    def facts(self) -> dict[str, Any]:
        """Of the backend in use, and why it is."""
        return {**self._backend.facts(), "degraded": self.degraded}

    def close(self) -> None:
        """Release the backend in use."""
        with self._lock:
            if self._in_use is not None:
                self._in_use.close()

    def _encoded(self, encode: Callable[[Backend], tuple[Any, T]]) -> tuple[Any, T]:
        """What `encode` gives on the first backend that does not fail: embeddings first."""

        def checked(backend: Backend) -> tuple[Any, T]:
            embeddings, also = encode(backend)
            check_finite(backend, "an embedding", embeddings)
            if isinstance(embeddings, DeviceArray):
                self._owners.add(embeddings.owner)
            return embeddings, also

        return self._tried(checked)

    def _tried(self, call: Callable[[Backend], T]) -> T:
        """What `call` gives on the first backend that does not fail."""
        with self._lock:
            while True:
                try:
                    return call(self._backend)
                except DeviceError as e:
                    self._step_down(e)

    def _step_down(self, error: DeviceError) -> None:
        """Give up the backend in use for the next one; `error` where there is none."""
        if not self._openers:
            raise error
        given_up, self._in_use = self._backend, None
        with suppress(MedsaError):
            given_up.close()
        self._owners.clear()
        self._in_use = self._next(f"{given_up.name}: {error}")

    def _next(self, reason: str | None) -> Backend:
        """Open the next backend that can be; `reason`: why the last was given up."""
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
