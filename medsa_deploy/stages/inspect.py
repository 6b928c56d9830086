"""A checkpoint file → its network, conventions and where they came from."""

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
    """The facts of a checkpoint."""

    source: Source
    network: Network
    conventions: Conventions
    guesses: tuple[Guess, ...]
    """Facts that the checkpoint does not determine."""
    notes: tuple[str, ...]
    """Changes that were made while the checkpoint was read."""
    lora: tuple[LoRA, ...]
    """Linear layers with a low-rank update, which is merged into their weights."""


def inspect_checkpoint(
    checkpoint: Path,
    *,
    base: Path | None,
    overrides: Overrides,
    weights: str | None = None,
    prefix: str | None = None,
) -> Inspection:
    """Read a checkpoint's facts; nothing is written. `weights`, `prefix`: see `load_checkpoint`."""
    loaded, architecture = read_checkpoint(
        checkpoint, base, overrides, weights=weights, prefix=prefix
    )
    return Inspection(
        source=loaded.source,
        network=architecture.network,
        conventions=architecture.conventions,
        guesses=architecture.guesses,
        notes=loaded.notes,
        lora=loaded.lora,
    )


def read_checkpoint(
    path: Path,
    base: Path | None,
    overrides: Overrides,
    *,
    weights: str | None = None,
    prefix: str | None = None,
) -> tuple[Checkpoint, Architecture]:
    """A checkpoint's tensors, and the architecture inferred from them."""
    with export_extra():
        from medsa_deploy.exporters.architecture import infer
        from medsa_deploy.exporters.checkpoint import load_checkpoint
    loaded = load_checkpoint(path, base=base, weights=weights, prefix=prefix)
    return loaded, infer(loaded, overrides)


@contextmanager
def export_extra() -> Iterator[None]:
    """Guard imports of the exporters: MissingDependencyError names the extra of a missing library.

    All libraries are checked first, because torch asks for onnxscript only after minutes of work.
    """
    for library in EXPORT_LIBRARIES:
        if find_spec(library) is None:
            name = library.replace("_", "-")
            raise MissingDependencyError(name, extra="export", purpose="reading a checkpoint")
    yield
