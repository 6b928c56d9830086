"""A portable encoder → faster encoders for single backends, which share its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.manifest import Role

from .attention import bias_scores, fuse_attention
from .files import load_graph, save_beside
from .token_loops import loop_tokens


def write_backend_encoders(encoder: Sequence[Path]) -> dict[Role, Path]:
    """Write an encoder for each backend that runs another form faster; role → new file.

    `encoder`: the portable encoder's files. The last holds the weights, which the new encoders
    share. New files have the backend's name before the suffix: `encoder.openvino.onnx`.
    """
    written: dict[Role, Path] = {}
    rewrites: dict[Role, Callable[[Any], bool]] = {
        "encoder-onnxruntime": _for_onnxruntime,
        "encoder-openvino": lambda model: bias_scores(model) > 0,
    }
    for role, rewrite in rewrites.items():
        model = load_graph(encoder[0])
        if rewrite(model):
            stem, suffix = encoder[0].name.split(".", 1)
            backend = role.removeprefix("encoder-")
            written[role] = encoder[0].with_name(f"{stem}.{backend}.{suffix}")
            save_beside(model, written[role], encoder[-1])
    return written


def _for_onnxruntime(model: Any) -> bool:
    """Rewrite a graph in place; False for a graph without attention over many tokens."""
    fused = fuse_attention(model) > 0
    if fused:
        loop_tokens(model)
    return fused
