"""An encoder's portable graph → those that one backend each runs better, beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.manifest import Role

from .attention import bias_scores, fuse_attention
from .files import load_graph, save_beside
from .token_loops import loop_tokens


def write_backend_encoders(encoder: Sequence[Path]) -> dict[Role, Path]:
    """Write a backend's own encoder beside a portable one, for each that runs another form better.

    `encoder`: its files, the last of which holds the weights; they are shared, not copied. The new
    files have the backend's name before the suffix: `encoder.openvino.onnx`.
    """
    written: dict[Role, Path] = {}
    rewrites: dict[Role, Callable[[Any], bool]] = {
        "encoder-onnxruntime": _for_onnxruntime,
        "encoder-openvino": lambda model: bias_scores(model) > 0,
    }
    for role, rewrite in rewrites.items():
        model = load_graph(encoder[0])
        if rewrite(model):
            stem, rest = encoder[0].name.split(".", 1)
            backend = role.removeprefix("encoder-")
            written[role] = encoder[0].with_name(f"{stem}.{backend}.{rest}")
            save_beside(model, written[role], encoder[-1])
    return written


def _for_onnxruntime(model: Any) -> bool:
    """Rewrite a graph in place, where attention over many tokens is in it; whether it was."""
    fused = fuse_attention(model) > 0
    if fused:
        loop_tokens(model)
    return fused
