"""The first bytes of a file, or a folder's names → what it is, when it is no checkpoint.

People download a page instead of a file, give the folder that a trainer wrote, or another format.
"""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from pathlib import Path

from .torch_files import is_archive

SAVE_WEIGHTS = "save the weights alone, with torch.save(model.state_dict(), FILE)"
HEAD_BYTES = 512
MOST_INDEX = 64 * 2**20
"""Bytes of the largest index of a sharded checkpoint that is looked into."""
IN_FOLDERS = (
    "model.safetensors",
    "pytorch_model.bin",
    "last.ckpt",
    "checkpoints/last.ckpt",
    "checkpoints/*.ckpt",
    "*.ckpt",
    "mp_rank_00_model_states.pt",
    "global_step*/mp_rank_00_model_states.pt",
    "*.pth",
    "*.pt",
    "*.safetensors",
)
"""Where trainers (transformers, Lightning, DeepSpeed) put weights in their folders, best first."""


def file_kind(path: Path) -> str | None:
    """What a file is and what to do, such as "a Git LFS pointer: run git lfs pull".

    None for an unknown file, and for one that may be a checkpoint.
    """
    with path.open("rb") as f:
        head = f.read(HEAD_BYTES)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file itself: download it again, with a browser if need be"
    if head.startswith(b"\x1f\x8b"):
        return "compressed with gzip: unpack it first (gunzip)"
    if _is_onnx(head):
        return "an ONNX graph, not a checkpoint: give the checkpoint it was exported from"
    if text.startswith(b"{"):
        return _json_kind(path)
    return _archive_kind(path) if is_archive(path) else None


def folder_kind(path: Path) -> str:
    """What to give instead of a folder: the file in it that holds weights, if there is one."""
    for pattern in IN_FOLDERS:
        if files := sorted(path.glob(pattern)):
            return f"a folder: give the file in it, {files[-1]}"
    return "a folder"


def _is_onnx(head: bytes) -> bool:
    """Whether a file begins as ONNX does: its version, then the name of its producer."""
    return head[:1] == b"\x08" and head[2:3] == b"\x12" and head[3:4] != b""


def _json_kind(path: Path) -> str:
    if path.stat().st_size <= MOST_INDEX:
        with suppress(ValueError, OSError):
            index = json.loads(path.read_bytes())
            if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
                shards = sorted(set(map(str, index["weight_map"].values())))
                return (
                    f"the index of a sharded checkpoint ({len(shards)} files, such as "
                    f"{shards[0][:80] if shards else 'none'}): join them into one file first, by "
                    "loading the model and saving its state dict"
                )
    return "JSON, not a checkpoint"


def _archive_kind(path: Path) -> str | None:
    with suppress(Exception):  # zipfile raises nearly anything for damaged bytes
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            return f"a TorchScript program, expected its weights: {SAVE_WEIGHTS}"
        if names and all(name.endswith(".npy") for name in names):
            return f"an NPZ of numpy arrays, expected a checkpoint: {SAVE_WEIGHTS}"
        if not any(name.endswith("data.pkl") for name in names):
            return "a ZIP archive without a checkpoint's pickle: unpack it, and give the file in it"
    return None
