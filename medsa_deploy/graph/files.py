"""Graph ⇄ file; the weights of a large graph are in a second file."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from medsa_deploy.bundle.files import EXTERNAL_DATA_BYTES, IR_VERSION
from medsa_deploy.bundle.node_names import METADATA
from medsa_deploy.errors import BundleError, MissingDependencyError

SHARED_BYTES = 4096
"""Smaller tensors are not shared between files: each file has a copy."""


def load_graph(path: Path) -> Any:
    """The `onnx.ModelProto` in a file, weights included."""
    onnx = import_onnx()
    try:
        return onnx.load(path)
    except Exception as e:  # protobuf's errors share no base with onnx's
        raise BundleError(f"{path} is not an ONNX graph ({e}): export the checkpoint again") from e


def save_graph(model: Any, path: Path) -> list[Path]:
    """Write a graph; its files, the graph first. A large `model` loses its weights."""
    onnx = import_onnx()
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        entries = [entry for entry in node.metadata_props if entry.key == METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(entries)
    if model.ByteSize() <= EXTERNAL_DATA_BYTES:
        onnx.save(model, path)
        return [path]
    weights = path.with_name(f"{path.name}.data")
    onnx.save(model, path, save_as_external_data=True, location=weights.name)
    return [path, weights]


def save_beside(model: Any, path: Path, weights: Path) -> None:
    """Write a graph whose large tensors are read from a file that already holds them.

    `weights`: a file in the same folder that holds the tensors' bytes, such as an ONNX file. So
    graphs that differ in a few nodes share one copy of the weights. `model` loses its weights.
    """
    onnx = import_onnx()
    with weights.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as stored:
        end = 0
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < SHARED_BYTES:
                continue
            start = stored.find(tensor.raw_data, end)  # usually in the same order
            start = stored.find(tensor.raw_data) if start < 0 else start
            if start < 0:
                continue
            end = start + len(tensor.raw_data)
            onnx.external_data_helper.set_external_data(
                tensor, weights.name, offset=start, length=len(tensor.raw_data)
            )
            tensor.ClearField("raw_data")
    model.ir_version = IR_VERSION
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
