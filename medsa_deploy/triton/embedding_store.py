"""Embeddings of the images in use, within a number of bytes.

An image that is dropped is remembered by its number, so that the next prompt on it is refused with
the reason, and not answered for another image.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic

from medsa_deploy.errors import DeviceMemoryError, UsageError
from medsa_deploy.runtime import Embedding

MOST_REMEMBERED = 100_000
"""Numbers of dropped images that are remembered."""
SEND_AGAIN = "encode the image again"


def embedding_bytes(embedding: Embedding) -> int:
    """Bytes of an embedding with the decoder's image part."""
    parts = embedding.image_part or {}
    return int(embedding.values.nbytes) + sum(part.nbytes for part in parts.values())


class EmbeddingStore:
    """Embeddings by the number of their sequence; any thread may use it.

    >>> store = EmbeddingStore(most_bytes=1 << 30, idle_seconds=600)
    >>> store.add(7, [embedding])
    >>> store.find(7, slice_index=0) is embedding
    True
    """

    def __init__(
        self, *, most_bytes: int, idle_seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self.most_bytes, self.idle_seconds, self._clock = most_bytes, idle_seconds, clock
        self.bytes = 0
        self._images: OrderedDict[int, tuple[Sequence[Embedding], int, float]] = OrderedDict()
        """Number → embeddings, their bytes, the time of the last use; the last used last."""
        self._reasons: OrderedDict[int, str] = OrderedDict()
        """Number of a dropped image → why."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, number: int, embeddings: Sequence[Embedding]) -> None:
        """Keep an image's embeddings, in place of earlier ones of the number.

        The images that were not used for the longest time make room. DeviceMemoryError for an image
        that alone is larger than the store.
        """
        size = sum(map(embedding_bytes, embeddings))
        if size > self.most_bytes:
            raise DeviceMemoryError(
                f"the image's embeddings take {size / 1e6:.0f} MB, more than the "
                f"{self.most_bytes / 1e6:.0f} MB that a server's instance keeps: send fewer "
                "slices, or write the repository with a larger --cache"
            )
        with self._lock:
            self._drop(number)
            self._reasons.pop(number, None)
            while self.bytes + size > self.most_bytes:
                self._forget(next(iter(self._images)), self._full())
            self._images[number] = embeddings, size, self._clock()
            self.bytes += size

    def find(self, number: int, *, slice_index: int) -> Embedding:
        """The embedding of a slice.

        DeviceMemoryError for an image that was dropped, UsageError for a number without an image
        and for a slice that the image does not have.
        """
        with self._lock:
            if reason := self._reasons.get(number):
                raise DeviceMemoryError(f"{reason}: {SEND_AGAIN}")
            if number not in self._images:
                raise UsageError(
                    f"sequence {number} has no image: start a sequence with an image, then prompt"
                )
            embeddings, size, _ = self._images.pop(number)
            self._images[number] = embeddings, size, self._clock()
        if not 0 <= slice_index < len(embeddings):
            raise UsageError(
                f"slice {slice_index} was prompted, but the image has slices 0 to "
                f"{len(embeddings) - 1}"
            )
        return embeddings[slice_index]

    def remove(self, number: int) -> None:
        """Drop an image whose sequence has ended."""
        with self._lock:
            self._drop(number)
            self._reasons.pop(number, None)

    def remove_idle(self) -> None:
        """Drop images that were not used for the idle time."""
        with self._lock:
            limit = self._clock() - self.idle_seconds
            for number in [n for n, (_, _, used) in self._images.items() if used < limit]:
                self._forget(
                    number, f"the image was not used for {self.idle_seconds:g} s and was dropped"
                )

    def _full(self) -> str:
        return (
            f"the image was dropped to make room for newer ones: a server's instance keeps "
            f"{self.most_bytes / 1e6:.0f} MB of embeddings (--cache)"
        )

    def _drop(self, number: int) -> None:
        image = self._images.pop(number, None)
        self.bytes -= 0 if image is None else image[1]

    def _forget(self, number: int, reason: str) -> None:
        """Drop an image, and remember why."""
        self._drop(number)
        self._reasons[number] = reason
        while len(self._reasons) > MOST_REMEMBERED:
            self._reasons.popitem(last=False)
