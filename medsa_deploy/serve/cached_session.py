"""A bundle's session, a cache and a job → a session that computes embeddings and logits once.

`segment_volume` runs on it as on any session. Slices that know their place are looked up before
they are encoded, and prompts before they are decoded. Every run of the network is a chance to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

from numpy.typing import ArrayLike

from medsa_deploy.images import Image
from medsa_deploy.runtime import Embedding, Session
from medsa_deploy.runtime.backends.interface import Array
from medsa_deploy.transforms import Prompt
from medsa_deploy.transforms.intensities import IntensityWindow

from .bundles import ServedBundle
from .cache import NetworkCache
from .initial_mask import InitialMask, mask_logits

OBJECT_BYTES = 1024
"""Memory of an entry beside its arrays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedImage(Image):
    """A slice that knows its place."""

    owner: str
    """Names the volume; no other has this name."""
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedEmbedding(Embedding):
    """The embedding of a placed image."""

    key: tuple[Any, ...]
    """Owner, bundle, chunk, window and place in the chunk."""

    @property
    def index(self) -> int:
        """Its slice."""
        return int(self.key[3] + self.key[-1])


class CachedSession(Session):
    """Shares another session's backend; its owner closes that."""

    def __init__(
        self,
        bundle: ServedBundle,
        cache: NetworkCache,
        check: Callable[[], None],
        initial: InitialMask | None = None,
    ) -> None:
        """`check` is called before each run of the network, and raises to stop.

        Prompts of slices that `initial` reaches get its mask.
        """
        super().__init__(bundle.session.manifest, bundle.session.backend)
        self.bundle, self.cache, self.check = bundle, cache, check
        self.initial = initial
        self.encoded = 0
        """Slices that were encoded, rather than found."""

    def encode_slices(
        self,
        slices: Sequence[Image | ArrayLike],
        *,
        intensity_window: IntensityWindow = None,
    ) -> list[Embedding]:
        """As `Session.encode_slices`, of a chunk of slices that know their place."""
        self.check()
        first = slices[0]
        if not isinstance(first, PlacedImage):
            return super().encode_slices(slices, intensity_window=intensity_window)
        key = (first.owner, "embedding", self.bundle.name, first.index, intensity_window)

        def compute() -> list[Embedding]:
            with self.bundle.running:
                self.check()
                embeddings = Session.encode_slices(self, slices, intensity_window=intensity_window)
            self.encoded += len(slices)
            return [_placed(embedding, (*key, i)) for i, embedding in enumerate(embeddings)]

        return self.cache.embeddings.value(key, compute, size=_embedding_bytes, check=self.check)

    def decode_logits(self, embedding: Embedding, prompts: Sequence[Prompt]) -> tuple[Array, Array]:
        """As `Session.decode_logits`."""
        self.check()
        if not isinstance(embedding, PlacedEmbedding):
            return super().decode_logits(embedding, prompts)
        prompts = [self._with_mask(prompt, embedding) for prompt in prompts]
        undivided = embedding.image_part is None  # the decoder in one part rounds differently
        key = (*embedding.key, "logits", undivided, *map(_prompt_key, prompts))

        def compute() -> tuple[Array, Array]:
            with self.bundle.running:
                return Session.decode_logits(self, embedding, prompts)

        return self.cache.logits.value(key, compute, size=_logit_bytes, check=self.check)

    def _with_mask(self, prompt: Prompt, embedding: PlacedEmbedding) -> Prompt:
        """A prompt set of a slice, with the mask that the client brought for it."""
        size, index = self.manifest.mask_prompt_size, embedding.index
        if self.initial is None or size is None or index not in self.initial.slices:
            return prompt
        return replace(prompt, mask=mask_logits(self.initial.planes[index], embedding.frame, size))

    def close(self) -> None:
        """Nothing: the backend is the other session's."""

    def __enter__(self) -> CachedSession:
        return self


def _placed(embedding: Embedding, key: tuple[Any, ...]) -> Embedding:
    values = {field.name: getattr(embedding, field.name) for field in fields(Embedding)}
    return PlacedEmbedding(**values, key=key)


def _prompt_key(prompt: Prompt) -> tuple[bytes | None, ...]:
    """What decides a prompt set's logits, each part as a digest: keys have no size in the cache."""
    arrays = (prompt.points, prompt.labels, prompt.box, prompt.mask)
    return tuple(
        None if a is None else blake2b(a.tobytes(), digest_size=16).digest() for a in arrays
    )


def _embedding_bytes(embeddings: Sequence[Embedding]) -> int:
    parts = sum(part.nbytes for e in embeddings if e.image_part for part in e.image_part.values())
    return OBJECT_BYTES + parts + sum(int(e.values.nbytes) for e in embeddings)


def _logit_bytes(decoded: tuple[Array, Array]) -> int:
    return OBJECT_BYTES + sum(array.nbytes for array in decoded)
