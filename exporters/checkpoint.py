"""A checkpoint file → its tensors in float32, and where they came from.

Files are read without running code they carry (`pickles.py`), or as safetensors.
Everything about the architecture is read later, from keys and shapes (`architecture.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import Source
from medsa_deploy.errors import CheckpointError, about

from .containers import Weights, find_weights
from .families.registry import family_of, layout_of, merged, missing_stems
from .file_kinds import file_kind, folder_kind
from .layouts import REL_POS
from .lora import LoRA
from .pickles import StandIn
from .shapes import Shapes
from .torch_files import SpecialTensor, read_torch_file

logger = logging.getLogger(__name__)

EXPECTED = "expected a checkpoint file (.pth, .pt or .safetensors)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint's weights and their origin."""

    source: Source
    tensors: Mapping[str, Tensor]
    """SAM's key → float32 tensor, low-rank updates merged; integer tensors as they are."""
    public_training: bool
    """Whether the file is a training container of the public Med-SA code."""
    notes: tuple[str, ...]
    """Changes that were made while the file was read."""
    lora: tuple[LoRA, ...] = ()
    """The linear layers that carried a low-rank update."""
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every tensor of the file, and of its base, before updates were merged."""

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor."""
        return Shapes({key: tuple(value.shape) for key, value in self.tensors.items()})

    @property
    def evidence(self) -> Shapes:
        """Shape of every tensor, low-rank factors included: what shows the network's family."""
        return Shapes({**self.stored, **self.shapes})


def load_checkpoint(
    path: Path, *, base: Path | None = None, weights: str | None = None, prefix: str | None = None
) -> Checkpoint:
    """Read a `.pth`, `.pt` or `.safetensors` file, an adapter-only one laid over `base`.

    `weights`: which state dict of several, by the keys it is under, joined by dots. `prefix`: of
    its keys, if they are those of several networks. Nothing in the file is run; what lies beside
    the weights does not matter. CheckpointError for a file that is missing, truncated or not a
    checkpoint, and for a choice that is left open.
    """
    data = _read(path)
    chosen = _weights(data, path, weights, prefix)
    notes = _remarks(chosen)
    tensors, container = _tensors(chosen.entries, path), _container(data, chosen)
    if base is not None:
        container = "adapters over a base"
        base_weights = _weights(_read(base), base, None, None)
        tensors = _lay_over(tensors, _tensors(base_weights.entries, base), base, notes)
    _require_stems(tensors, path, base)
    kinds = sorted({_name(v.dtype) for v in tensors.values() if v.is_floating_point()})
    if narrow := [kind for kind in kinds if kind != "float32"]:
        notes.append(f"{' and '.join(narrow)} weights were made float32")
    source = Source(
        checkpoint=path.name,
        sha256=sha256(path),
        container=container,
        dtype=", ".join(kinds),
        base=None if base is None else base.name,
        base_sha256=None if base is None else sha256(base),
        weights=chosen.location,
        prefix=chosen.prefix,
    )
    for note in notes:
        logger.warning("%s: %s", path.name, note)
    tensors_merged, lora = merged(
        {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    )
    return Checkpoint(
        source=source,
        tensors=tensors_merged,
        lora=lora,
        stored={key: tuple(value.shape) for key, value in tensors.items()},
        public_training=isinstance(data, dict) and {"epoch", "path_helper"} <= set(data),
        notes=tuple(notes),
    )


def _read(path: Path) -> Any:
    """What a file holds, without running code it carries."""
    with about(path):
        return _content(path)


def _content(path: Path) -> Any:
    if path.is_dir():
        raise CheckpointError(f"{path} is {folder_kind(path)}; {EXPECTED}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {EXPECTED}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: {EXPECTED}")
    if kind := file_kind(path):
        raise CheckpointError(f"{path} is {kind}; {EXPECTED}")
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def _read_torch(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except MemoryError:
        raise
    except Exception as e:  # a damaged file makes a parser raise anything
        reason = f" ({e})" if isinstance(e, CheckpointError) else ""
        raise CheckpointError(f"{path} is truncated or not a checkpoint{reason}: {EXPECTED}") from e


def _is_safetensors(path: Path) -> bool:
    """By its suffix, or by its first bytes: the header's length, then JSON."""
    with path.open("rb") as f:
        return path.suffix.lower() == ".safetensors" or f.read(10)[8:] == b'{"'


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is truncated or not safetensors: {EXPECTED}") from e


def _weights(data: Any, path: Path, location: str | None, prefix: str | None) -> Weights:
    """The one state dict in what a file holds."""
    try:
        return find_weights(data, location=location, prefix=prefix)
    except CheckpointError as e:
        with about(path):
            raise CheckpointError(f"{path}: {e}") from e


def _container(data: Any, weights: Weights) -> str:
    """Form of the file, in words."""
    if isinstance(data, dict) and weights.location and {"epoch", "optimizer"} & set(data):
        return "training checkpoint"
    if isinstance(data, StandIn) and not weights.location:
        return f"pickled module {data.name}"
    return f"state dict under '{weights.location}'" if weights.location else "state dict"


def _remarks(weights: Weights) -> list[str]:
    """What was chosen and left out, in words."""
    remarks = []
    if weights.prefix:
        remarks.append(f"the prefix {weights.prefix!r} was taken off its keys")
    if weights.left_out:
        remarks.append(f"{weights.left_out} tensors beside those under the prefix are left out")
    return remarks


def _tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """A state dict's tensors by SAM's names, as stored; CheckpointError for anything else."""
    for fault, has_fault in FAULTS.items():
        if keys := [key for key, value in state.items() if has_fault(value)]:
            raise CheckpointError(
                f"{path} has {fault}: {_first_few(keys)}; expected a state dict of finite tensors"
            )
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = REL_POS.sub(r"\1rel_pos_\2", key)
        if name in tensors:
            raise CheckpointError(f"{path} has two entries for {_first_few([name])}: expected one")
        tensors[name] = value.detach()
    return tensors


def _is_special(kind: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, SpecialTensor) and value.kind == kind


def _is_finite(value: Tensor) -> bool:
    """Whether a tensor is finite once it is float32."""
    return not value.is_floating_point() or bool(value.float().isfinite().all())


FAULTS: Mapping[str, Callable[[Any], bool]] = {
    "sparse tensors": _is_special("sparse"),
    "quantized tensors": _is_special("quantized"),
    "nested tensors": _is_special("nested"),
    "tensors without data": _is_special("without data"),
    "entries that are not tensors": lambda value: not isinstance(value, Tensor),
    "weights that are NaN or infinite": lambda value: not _is_finite(value),
}
"""Faults that make an entry of a state dict unusable, tested in this order."""


def _lay_over(
    adapters: dict[str, Tensor], base: dict[str, Tensor], path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """An adapter-only state dict over the one of a base SAM, read from `path`."""
    shapes = Shapes({key: tuple(value.shape) for key, value in base.items()})
    renamed = family_of(shapes).layout.as_base(base)
    under = layout_of(adapters).under(adapters, renamed, path.name)
    notes.append(f"laid over {path.name}: {len(under.tensors)} of its {len(base)} tensors are used")
    notes += under.notes
    return under.tensors | adapters


def _require_stems(tensors: Mapping[str, Tensor], path: Path, base: Path | None) -> None:
    """CheckpointError for keys that cannot be a whole network; a file of adapters lacks some."""
    missing = missing_stems(tensors)
    if not missing:
        return
    lacks = f"nothing under {', '.join(missing)}"
    if base is not None:
        raise CheckpointError(
            f"{path} over {base} is not a SAM checkpoint: {lacks}; give the SAM checkpoint the "
            "adapters were trained on with --base FILE"
        )
    if any(map(layout_of(tensors).adapter_keys.search, tensors)):
        raise CheckpointError(
            f"{path} holds adapters only ({len(tensors)} tensors; {lacks}): give the SAM "
            "checkpoint they were trained on with --base FILE"
        )
    raise CheckpointError(f"{path} is not a SAM checkpoint: {lacks}; found {_first_few(tensors)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_few(names: Iterable[Any], limit: int = 6) -> str:
    """The first few names, and how many more there are, fit for one line."""
    names = list(names)
    shown = [repr(n)[1:-1][:100] if isinstance(n, str) else type(n).__name__ for n in names[:limit]]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + more
