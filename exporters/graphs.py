"""The folded network → `encoder.onnx`, `decoder.onnx` and the decoder's two parts.

Names are SAM's own, so that existing SAM tools can load the files. Inputs and outputs are float32;
B, E, P and N are dynamic.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsa_deploy.bundle.files import EXTERNAL_DATA_BYTES, IR_VERSION
from medsa_deploy.bundle.manifest import GraphContract, Network, Role
from medsa_deploy.bundle.manifest import Tensor as Contract
from medsa_deploy.bundle.node_names import METADATA, innermost, node_name
from medsa_deploy.errors import ParityError

from .capture import capture, quick_translation
from .families.registry import family_named
from .folded.split import ImagePart
from .networks import FoldedNetwork

logger = logging.getLogger(__name__)

OPSET = 20
"""First opset with Gelu as one operator; 23 would bring Attention, which float32 cannot build."""

COPIED = ("image_tokens", "image_key", "image_value", "image_query")
"""Inputs that the click part's module repeats for every prompt set, and its graph does not."""

WIDTH = 256
"""Width of SAM's embeddings and prompt tokens."""


def contract(network: Network) -> dict[str, GraphContract]:
    """Tensor contract of encoder and decoder of a network."""
    side, g = network.image_size, network.embedding_size
    batch = network.slices or "B"
    image = Contract(name="image", dtype="float32", shape=(batch, 3, side, side))
    encoded = Contract(name="image_embeddings", dtype="float32", shape=(batch, WIDTH, g, g))
    embeddings = Contract(name="image_embeddings", dtype="float32", shape=("E", WIDTH, g, g))
    prompts = [
        Contract(name="point_coords", dtype="float32", shape=("P", "N", 2)),
        Contract(name="point_labels", dtype="float32", shape=("P", "N")),
    ]
    if family_named(network.family).decoder.takes_masks:
        prompts += [
            Contract(name="mask_input", dtype="float32", shape=("P", 1, 4 * g, 4 * g)),
            Contract(name="has_mask_input", dtype="float32", shape=(1,)),
        ]
    k = network.masks
    results = (
        Contract(name="low_res_masks", dtype="float32", shape=("max(E,P)", k, 4 * g, 4 * g)),
        Contract(name="iou_predictions", dtype="float32", shape=("max(E,P)", k)),
    )
    return {
        "encoder": GraphContract(inputs=(image,), outputs=(encoded,)),
        "decoder": GraphContract(inputs=(embeddings, *prompts), outputs=results),
    }


def parts_contract(part: ImagePart, decoder: GraphContract) -> dict[str, GraphContract]:
    """Tensor contract of the decoder's parts; it depends on the widths of the first block."""
    embeddings, coords, labels, *_ = decoder.inputs
    tokens = int(embeddings.shape[2]) * int(embeddings.shape[3])
    heads = part.heads
    key, value, query = (
        width // heads
        for width in (
            part.key.linear.out_features,
            part.value.out_features,
            part.query.linear.out_features,
        )
    )
    shapes: dict[str, tuple[int | str, ...]] = {
        "image_tokens": ("E", tokens, WIDTH),
        "image_key": ("E", heads, key, tokens),
        "image_value": ("E", heads, tokens, value),
        "image_query": ("E", heads, query, tokens),
    }
    between = tuple(Contract(name=n, dtype="float32", shape=s) for n, s in shapes.items())
    return {
        "decoder-image": GraphContract(inputs=(embeddings,), outputs=between),
        "decoder-click": GraphContract(inputs=(*between, coords, labels), outputs=decoder.outputs),
    }


def export_graphs(
    folded: FoldedNetwork,
    graphs: Mapping[str, GraphContract],
    folder: Path,
    *,
    chunk: int = 1,
    on_graph: Callable[[str], None] = lambda name: None,
) -> dict[Role, list[Path]]:
    """Write all graphs into `folder`; the files of each, the ONNX file first.

    `chunk`: slices that are encoded together, in 3D. `on_graph` is called with a graph's name
    before it is exported.
    """
    files: dict[Role, list[Path]] = {}
    on_graph("encoder")
    files["encoder"] = export_encoder(
        folded.encoder, graphs["encoder"], folder / "encoder.onnx", chunk=chunk
    )
    on_graph("decoder")
    files["decoder"] = _export(folded.decoder, graphs["decoder"], folder / "decoder.onnx")
    on_graph("decoder's parts")
    parts: dict[Role, nn.Module] = {
        "decoder-image": folded.image_part,
        "decoder-click": folded.click_part,
    }
    for role, part in parts.items():
        files[role] = _export(part, graphs[role], folder / f"{role}.onnx")
    return files


def export_encoder(
    encoder: nn.Module, graph: GraphContract, path: Path, *, chunk: int = 1
) -> list[Path]:
    """Write an encoder that sees `chunk` slices together; its files, the ONNX file first."""
    return _export(encoder, graph, path, batch=2 * chunk)


def _export(module: nn.Module, graph: GraphContract, path: Path, *, batch: int = 2) -> list[Path]:
    """One module as an ONNX file, and its weights' file where they are too large for one."""
    examples = tuple(_example(tensor, batch) for tensor in graph.inputs)
    dynamic = tuple(
        {axis: name for axis, name in enumerate(tensor.shape) if isinstance(name, str)} or None
        for tensor in graph.inputs
    )
    with warnings.catch_warnings(), quick_translation():
        # The exporter warns about its own internals and about N standing at two inputs.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            capture(module, examples, dynamic),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    _name_axes(program.model, graph)
    _broadcast(program.model, [tensor.name for tensor in graph.inputs if tensor.name in COPIED])
    _name_nodes(program.model)
    program.model.ir_version = IR_VERSION
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    external = size > EXTERNAL_DATA_BYTES
    program.save(path, external_data=external)
    return [path, *([path.with_name(f"{path.name}.data")] if external else [])]


def _example(tensor: Contract, batch: int) -> Tensor:
    """An example input; dynamic axes differ and exceed 1, or the exporter fixes or merges them.

    So does the number of chunks in the batch.
    """
    sizes = {"B": batch, "E": 3, "P": 2, "N": 5}
    return torch.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape])


def _broadcast(model: Any, names: Sequence[str]) -> None:
    """Have what reads the repetition of an input read the input: products and sums broadcast.

    Only the exporter needs the repetition, and it copies megabytes with every click.
    """
    for value in model.graph.inputs:
        if value.name not in names:
            continue
        (gather,) = (node for node, _ in value.uses() if node.op_type == "Gather")
        for node, i in tuple(gather.outputs[0].uses()):
            if node.op_type not in ("MatMul", "Add"):
                raise ParityError(f"{node.op_type} reads {value.name}, and does not broadcast")
            node.replace_input_with(i, value)
        model.graph.remove(gather, safe=True)


def _name_nodes(model: Any) -> None:
    """Name nodes by their modules, and what they make, which optimizers name new nodes after.

    What else the exporter says is dropped, such as paths of sources.
    """
    for node in model.graph.all_nodes():
        module_path = node.metadata_props.get(METADATA, "")
        module = innermost(module_path)
        node.name = node_name(module, node.name)
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                value.name = node_name(module, value.name)
        node.metadata_props.clear()
        node.metadata_props[METADATA] = module_path


def _name_axes(model: Any, graph: GraphContract) -> None:
    """Give the graph's outputs the contract's axis names; ParityError where a shape differs."""
    values = [*model.graph.inputs, *model.graph.outputs]
    for value, tensor in zip(values, (*graph.inputs, *graph.outputs), strict=True):
        shape = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
        for axis, expected in enumerate(tensor.shape):
            if isinstance(expected, str) != isinstance(shape[axis], str) or (
                isinstance(expected, int) and expected != shape[axis]
            ):
                raise ParityError(
                    f"the exported graph's {tensor.name} has shape {shape}, expected {tensor.shape}"
                )
            if isinstance(expected, str):
                value.shape[axis] = expected
