"""A checkpoint file → its tensors in float32, and where they came from.

Files are opened without running code they carry: `torch.load(weights_only=True)` or safetensors.
Everything about the architecture is read later, from keys and shapes (`architecture.py`).
"""

from __future__ import annotations

import logging
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import Source
from medsa_deploy.errors import CheckpointError

from .families.registry import missing_stems
from .lora import LoRA, merge
from .shapes import Shapes

logger = logging.getLogger(__name__)

REL_POS = re.compile(r"(image_encoder\.blocks\.\d+\.attn\.)rel_(?:pos_)?([hw])\Z")
"""A relative-position table: `rel_pos_h` in Meta's and old Med-SA files, `rel_h` in newer ones."""

HARMLESS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.nn\.parameter\.Parameter"
    r"|torch\.(\w*Storage|storage\.\w+Storage|Size|Tensor|device|bool|(b?float|u?int)\d+)"
)
"""Objects torch rebuilds without running a file's code."""

EXPECTED = "expected a checkpoint file (.pth, .pt or .safetensors)"
SAVE_WEIGHTS = "save the weights alone, with torch.save(model.state_dict(), FILE)"


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

    @property
    def shapes(self) -> Shapes:
        """Shape of every tensor."""
        return Shapes({key: tuple(value.shape) for key, value in self.tensors.items()})


def load_checkpoint(path: Path, *, base: Path | None = None) -> Checkpoint:
    """Read a `.pth`, `.pt` or `.safetensors` file, an adapter-only one laid over `base`.

    Raises CheckpointError for a file that is missing, truncated, not a checkpoint, or that would
    have to run code to be read.
    """
    data = _read(path)
    state, container = _state_dict(data, path)
    tensors = _tensors(state, path)
    notes: list[str] = []
    if base is not None:
        container = "adapters over a base"
        tensors = _lay_over(tensors, _tensors(_state_dict(_read(base), base)[0], base), base, notes)
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
    )
    for note in notes:
        logger.warning("%s: %s", path.name, note)
    merged, lora = merge({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return Checkpoint(
        source=source,
        tensors=merged,
        lora=lora,
        public_training={"epoch", "path_helper"} <= set(data),
        notes=tuple(notes),
    )


def _read(path: Path) -> dict[Any, Any]:
    """The dictionary a file holds, without running code it carries."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {state}: {EXPECTED}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: {EXPECTED}")
    data = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, expected a state dict: {SAVE_WEIGHTS}"
        )
    return data


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():  # about how the file was written, not about what it holds
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as e:  # a damaged file makes a parser raise anything
        if names := _code_in(path):
            raise CheckpointError(
                f"{path} holds Python objects ({_first_few(names)}) and would have to run code to "
                f"be read, which is refused: {SAVE_WEIGHTS}"
            ) from e
        if "TorchScript" in str(e):
            raise CheckpointError(
                f"{path} is a TorchScript program, expected its weights: {SAVE_WEIGHTS}"
            ) from e
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {EXPECTED}") from e


def _code_in(path: Path) -> list[str]:
    """Names of the Python objects a file asks for beyond tensors, as far as it can be parsed."""
    names: set[str] = set()
    with suppress(Exception):  # a damaged file makes a parser raise anything
        if zipfile.is_zipfile(path):
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        else:
            with path.open("rb") as f:
                names.update(_globals(f))
    return sorted(name for name in names if not HARMLESS.fullmatch(name))


def _globals(f: BinaryIO) -> Iterator[str]:
    """Names a file of pickles would import, found by reading its opcodes, none of them executed.

    torch's old format is four pickles, the third of them the state dict, followed by raw numbers.
    """
    for _ in range(4):
        strings: list[Any] = ["", ""]
        memo: dict[Any, Any] = {}
        for opcode, value, _ in pickletools.genops(f):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(value).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(map(str, strings[-2:]))
            elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
                memo[len(memo) if value is None else value] = strings[-1]
            elif "GET" in opcode.name:
                strings.append(memo.get(value))
            elif isinstance(value, str):
                strings.append(value)


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


def _state_dict(data: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], str]:
    """The state dict inside a container, and what the container is called."""
    for key in ("state_dict", "model"):
        if isinstance(data.get(key), dict) and data[key]:
            training = "epoch" in data or "optimizer" in data
            return data[key], "training checkpoint" if training else f"state dict under '{key}'"
    if any(isinstance(value, Tensor) for value in data.values()):
        return data, "state dict"
    raise CheckpointError(
        f"{path} holds no weights: found {_first_few(data) or 'nothing'}, expected a state dict, "
        "or one under 'state_dict' or 'model'"
    )


def _tensors(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """A state dict's tensors by SAM's names, as stored; CheckpointError for anything else."""
    for fault, has_fault in FAULTS.items():
        if keys := [key for key, value in state.items() if has_fault(key, value)]:
            raise CheckpointError(
                f"{path} has {fault}: {_first_few(keys)}; expected a state dict of finite tensors"
            )
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = REL_POS.sub(r"\1rel_pos_\2", key.removeprefix("module."))
        if name in tensors:
            raise CheckpointError(f"{path} has two entries for {_first_few([name])}: expected one")
        tensors[name] = value.detach()
    return tensors


def _is_finite(value: Tensor) -> bool:
    """Whether a tensor is finite once it is float32."""
    return not value.is_floating_point() or bool(value.float().isfinite().all())


FAULTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "keys that are not names": lambda key, value: not isinstance(key, str),
    "entries that are not tensors": lambda key, value: not isinstance(value, Tensor),
    "sparse tensors": lambda key, value: value.layout != torch.strided,
    "quantized tensors": lambda key, value: value.is_quantized,
    "tensors without data": lambda key, value: value.is_meta,
    "weights that are NaN or infinite": lambda key, value: not _is_finite(value),
}
"""Faults that make an entry of a state dict unusable, tested in this order."""


def _lay_over(
    adapters: dict[str, Tensor], base: dict[str, Tensor], path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """An adapter-only state dict over the one of a base SAM, read from `path`.

    A two-way block that brings the public code's MLP replaces Meta's, whose keys differ.
    """
    replaced = {
        key[: key.index(".mlp.")]
        for key in adapters
        if ".mlp.layers.0.0." in key or ".mlp.fc." in key
    }
    kept = {
        key: value
        for key, value in base.items()
        if key not in adapters and not any(key.startswith(f"{b}.mlp.lin") for b in replaced)
    }
    notes.append(f"laid over {path.name}: {len(kept)} of its {len(base)} tensors are used")
    if any(REL_POS.match(key) and value.any() for key, value in kept.items()):
        notes.append(
            f"the relative-position tables are those of {path.name}; the public code since January "
            "2024 trains without them: adapters from it need a base whose tables are zero"
        )
    return kept | adapters


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
    if any("_Adapter." in key or ".lora_" in key for key in tensors):
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
