"""Graphs ⇄ files, with the weights of large ones in a file of their own."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.node_names import METADATA
from medsa_deploy.errors import BundleError, MissingDependencyError

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Graphs beyond this keep their weights beside them: a protobuf message ends at 2 GiB."""
SHARED_BYTES = 4096
"""Tensors below this are written again."""


def load_graph(path: Path) -> Any:
    """The `onnx.ModelProto` in a file, weights included."""
    onnx = import_onnx()
    try:
        return onnx.load(path)
    except Exception as e:  # protobuf's errors share no base with onnx's
        raise BundleError(f"{path} is not an ONNX graph ({e}): export the checkpoint again") from e


def save_graph(model: Any, path: Path) -> list[Path]:
    """Write a graph → its files, the graph first. A large `model` is left without its weights."""
    onnx = import_onnx()
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    if model.ByteSize() <= EXTERNAL_DATA_BYTES:
        onnx.save(model, path)
        return [path]
    weights = path.with_name(f"{path.name}.data")
    onnx.save(model, path, save_as_external_data=True, location=weights.name)
    return [path, weights]


def save_beside(model: Any, path: Path, weights: Path) -> None:
    """Write a graph whose large tensors are read out of another file, where they lie already.

    `weights`: a file in the same folder that holds their bytes, as an ONNX file does. A graph that
    differs from another in a few nodes takes no second copy of its weights that way. `model` is
    left without them.
    """
    onnx = import_onnx()
    with weights.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as held:
        end = 0
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < SHARED_BYTES:
                continue
            start = held.find(tensor.raw_data, end)  # in the same order, as a rule
            start = held.find(tensor.raw_data) if start < 0 else start
            if start < 0:
                continue
            end = start + len(tensor.raw_data)
            onnx.external_data_helper.set_external_data(
                tensor, weights.name, offset=start, length=len(tensor.raw_data)
            )
            tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


def import_onnx() -> Any:
    """The library that reads and writes graphs; MissingDependencyError names the extra."""
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.shape_inference
    except ImportError as e:
        raise MissingDependencyError("onnx", extra="quantize", purpose="changing precision") from e
    return onnx
