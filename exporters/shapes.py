"""The shapes of a checkpoint's tensors by key: what every size of a network is read from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from medsa_deploy.errors import CheckpointError

INDEX = re.compile(r"(?:0|[1-9]\d{0,2})\Z", re.ASCII)
"""An entry's number in a key; a longer one is not taken for a number, so its key is unknown."""


class Shapes(Mapping[str, tuple[int, ...]]):
    """Key → shape; a key that is not there is a CheckpointError, since a network needs it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def __getitem__(self, key: str) -> tuple[int, ...]:
        try:
            return self._shapes[key]
        except KeyError as e:
            raise CheckpointError(f"the checkpoint lacks {key}") from e

    def __contains__(self, key: object) -> bool:
        return key in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def get(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:  # type: ignore[override]
        """The shape under `key`, or `default`."""
        return self._shapes.get(key, default)

    def count(self, prefix: str) -> int:
        """How many entries `prefix.0`, `prefix.1`, … there are: one more than the last index."""
        start = f"{prefix}."
        indices = {key[len(start) :].split(".", 1)[0] for key in self if key.startswith(start)}
        return max((int(i) + 1 for i in indices if INDEX.match(i)), default=0)
