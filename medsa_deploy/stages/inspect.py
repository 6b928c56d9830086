"""A checkpoint file → what it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from medsa_deploy.bundle.manifest import Conventions, Network, Source
from medsa_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Architecture, Guess, Overrides
    from medsa_deploy.exporters.checkpoint import Checkpoint
    from medsa_deploy.exporters.lora import LoRA

EXPORT_LIBRARIES = ("torch", "onnx", "onnxscript", "segment_anything", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is."""

    source: Source
    network: Network
    conventions: Conventions
    guesses: tuple[Guess, ...]
    """Facts the checkpoint does not settle."""
    notes: tuple[str, ...]
    """What was changed on the way in."""
    lora: tuple[LoRA, ...]
    """The linear layers that carried a low-rank update, which is merged."""


def inspect_checkpoint(checkpoint: Path, *, base: Path | None, overrides: Overrides) -> Inspection:
    """Read a checkpoint and say what it is; nothing is written."""
    loaded, architecture = read_checkpoint(checkpoint, base, overrides)
    return Inspection(
        source=loaded.source,
        network=architecture.network,
        conventions=architecture.conventions,
        guesses=architecture.guesses,
        notes=loaded.notes,
        lora=loaded.lora,
    )


def read_checkpoint(
    path: Path, base: Path | None, overrides: Overrides
) -> tuple[Checkpoint, Architecture]:
    """A checkpoint's tensors and the facts inferred from them."""
    with export_extra():
        from medsa_deploy.exporters.architecture import infer
        from medsa_deploy.exporters.checkpoint import load_checkpoint
    loaded = load_checkpoint(path, base=base)
    return loaded, infer(loaded, overrides)


@contextmanager
def export_extra() -> Iterator[None]:
    """Around imports of the exporters: a missing library is named with the extra that brings it.

    All of them, before anything runs: torch asks for onnxscript only after minutes of work.
    """
    for library in EXPORT_LIBRARIES:
        if find_spec(library) is None:
            name = library.replace("_", "-")
            raise MissingDependencyError(name, extra="export", purpose="reading a checkpoint")
    yield
