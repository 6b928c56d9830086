"""A checkpoint file → its tensors by SAM's key names, in float32, and where they came from.

Files are opened without running code they carry: `torch.load(weights_only=True)` or safetensors.
Everything about the architecture is read later, from keys and shapes (`architecture.py`).
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsa_deploy.errors import CheckpointError
from medsa_deploy.manifest import Source, sha256

from .shapes import Shapes

logger = logging.getLogger(__name__)

ENCODER_STEM = ("image_encoder.patch_embed.", "prompt_encoder.", "mask_decoder.")
"""What every complete checkpoint has keys under; an adapter-only file lacks at least one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint's weights and their origin."""

    source: Source
    tensors: Mapping[str, Tensor]
    """SAM's key → float32 tensor; integer tensors as they are."""
    public_training: bool
    """Whether the file is a training container of the public Med-SA code."""
    notes: tuple[str, ...]
    """What was changed on the way in, to be said aloud."""

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
    tensors = _named_as_sam(_only_tensors(state, path))
    public_training = {"epoch", "path_helper"} <= set(data)
    notes: list[str] = []
    if base is not None:
        tensors = _lay_over(tensors, _named_as_sam(_only_tensors(*_state_of(base))))
        container = "adapters over a base"
        notes.append(f"laid over {base.name}: keys the checkpoint lacks come from it")
    elif missing := [stem for stem in ENCODER_STEM if not any(k.startswith(stem) for k in tensors)]:
        raise CheckpointError(_incomplete(path, tensors, missing))
    dtype = _stored_dtype(tensors)
    if dtype != torch.float32:
        notes.append(f"{_name(dtype)} weights were made float32")
    source = Source(
        checkpoint=path.name,
        sha256=sha256(path),
        container=container,
        dtype=_name(dtype),
        base=None if base is None else base.name,
        base_sha256=None if base is None else sha256(base),
    )
    for note in notes:
        logger.warning("%s: %s", path.name, note)
    return Checkpoint(
        source=source,
        tensors={k: v.float() if v.is_floating_point() else v for k, v in tensors.items()},
        public_training=public_training,
        notes=tuple(notes),
    )


def _read(path: Path) -> dict[str, Any]:
    """The dictionary a file holds, without running code it carries."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}: expected a checkpoint file (.pth, .pt, .safetensors)"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    data = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, expected a state dict: "
            "save it with torch.save(model.state_dict(), path)"
        )
    return data


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        names = _code_in(path)
        if names:
            raise CheckpointError(
                f"{path} holds Python objects ({', '.join(names)}) and would have to run code to "
                "be read, which is refused: save the weights alone with "
                "torch.save(model.state_dict(), path)"
            ) from e
        raise CheckpointError(f"{path} is not a checkpoint that torch can read") from e
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {_first_line(e)}") from e


def _code_in(path: Path) -> list[str]:
    """Names of the Python objects a pickle asks for beyond tensors; none if it cannot be parsed."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a file that is no zip, or whose pickle is malformed: nothing to name
        text = path.read_bytes()[:4096]
        found = re.findall(rb"c([A-Za-z_][\w.]*)\n([A-Za-z_]\w*)\n", text)
        return sorted({b".".join(pair).decode() for pair in found})


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is truncated or not safetensors: {_first_line(e)}") from e


def _state_dict(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """The state dict inside a container, and what the container is called."""
    for key in ("state_dict", "model"):
        if isinstance(data.get(key), dict):
            training = "epoch" in data or "optimizer" in data
            return data[key], "training checkpoint" if training else f"state dict under '{key}'"
    if any(isinstance(value, Tensor) for value in data.values()):
        return data, "state dict"
    raise CheckpointError(
        f"{path} holds no weights: found {_some(data)}, expected a state dict, or one under "
        "'state_dict' or 'model'"
    )


def _state_of(path: Path) -> tuple[dict[str, Any], Path]:
    return _state_dict(_read(path), path)[0], path


def _only_tensors(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    if strange := [str(key) for key, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{path}: entries of the state dict are not tensors: {_some(strange)}"
        )
    if broken := [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise CheckpointError(f"{path}: weights hold NaN or Inf: {_some(broken)}")
    return state


def _named_as_sam(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DataParallel's `module.` taken off; newer Med-SA table names made Meta's again."""
    named = {}
    for key, value in tensors.items():
        key = key.removeprefix("module.")
        key = re.sub(r"(image_encoder\.blocks\.\d+\.attn\.)rel_([hw])$", r"\1rel_pos_\2", key)
        named[key] = value
    return named


def _lay_over(adapters: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter-only state dict over a base SAM's.

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
        if not any(key.startswith(f"{block}.mlp.lin") for block in replaced)
    }
    return kept | adapters


def _incomplete(path: Path, tensors: Mapping[str, Tensor], missing: list[str]) -> str:
    if any("_Adapter." in key or ".lora_" in key for key in tensors):
        return (
            f"{path} holds adapters only ({len(tensors)} tensors; nothing under "
            f"{', '.join(missing)}): give the SAM checkpoint they were trained on with --base FILE"
        )
    return f"{path} is not a SAM checkpoint: nothing under {', '.join(missing)}; found {_some(tensors)}"


def _stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest floating-point type among the tensors."""
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    return min(kinds, key=lambda d: torch.finfo(d).bits, default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _some(names: Any, limit: int = 6) -> str:
    """The first few of some names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
