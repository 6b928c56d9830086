"""Values by key, computed once → the last used of them, within a number of bytes.

Logits have a cache of their own: those of many clicks would push out embeddings, which cost more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")
POLL_SECONDS = 0.05
LOGITS_PART = 8
"""Logits may take one part in so many of a cache's memory."""
MOST_LOGIT_BYTES = 128 * 2**20


class ByteCache:
    """A cache that forgets what was not used for the longest time; any thread may use it.

    >>> cache = ByteCache(100)
    >>> cache.value(("image 1", 0), lambda: "embedding", size=lambda value: 60)
    'embedding'
    >>> cache.value(("image 2", 0), lambda: "other", size=lambda value: 60), len(cache)
    ('other', 1)
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = self.hits = self.misses = 0
        self._values: OrderedDict[tuple[Hashable, ...], tuple[Any, int]] = OrderedDict()
        self._computing: dict[tuple[Hashable, ...], threading.Event] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def value(
        self,
        key: tuple[Hashable, ...],
        compute: Callable[[], T],
        *,
        size: Callable[[T], int],
        check: Callable[[], None] = lambda: None,
    ) -> T:
        """The value of a key, computed unless it is known; others that ask meanwhile wait for it.

        The first part of a key is its owner, for `forget`. `size`: bytes of a value. `check` is
        called while waiting, and may raise. If a computation raises, the next caller computes.
        """
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    self.hits += 1
                    return cast(T, self._values[key][0])
                computed = self._computing.get(key)
                if computed is None:
                    computed = self._computing[key] = threading.Event()
                    self.misses += 1
                    break
            while not computed.wait(POLL_SECONDS):
                check()
        try:
            value = compute()
            self._keep(key, value, size(value))
        finally:
            with self._lock:
                del self._computing[key]
            computed.set()
        return value

    def forget(self, owner: Hashable) -> None:
        """Drop an owner's values."""
        with self._lock:
            for key in [key for key in self._values if key[0] == owner]:
                self.bytes -= self._values.pop(key)[1]

    def _keep(self, key: tuple[Hashable, ...], value: object, size: int) -> None:
        """Keep a value, and drop older ones; one that is larger than the cache is not kept."""
        with self._lock:
            if size > self.most_bytes:
                return
            self._values[key] = value, size
            self.bytes += size
            while self.bytes > self.most_bytes:
                self.bytes -= self._values.popitem(last=False)[1][1]


class NetworkCache:
    """What a network computed of the users' images: embeddings, and logits of prompts."""

    def __init__(self, most_bytes: int) -> None:
        logit_bytes = min(most_bytes // LOGITS_PART, MOST_LOGIT_BYTES)
        self.embeddings = ByteCache(most_bytes - logit_bytes)
        self.logits = ByteCache(logit_bytes)
        self.parts = self.embeddings, self.logits

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def bytes(self) -> int:
        """Memory of all values."""
        return sum(part.bytes for part in self.parts)

    @property
    def hits(self) -> int:
        """Values that were known."""
        return sum(part.hits for part in self.parts)

    @property
    def misses(self) -> int:
        """Values that were computed."""
        return sum(part.misses for part in self.parts)

    def forget(self, owner: Hashable) -> None:
        """Drop an owner's values."""
        for part in self.parts:
            part.forget(owner)
