"""A graph and the ranges of its activations → the same graph with INT8 linear layers.

A layer is a MatMul or Gemm with a constant matrix. Its input gets QuantizeLinear and
DequantizeLinear. Its weights are stored as INT8, with one scale for each output channel, and get
DequantizeLinear. Its bias stays float32: TensorRT's parser refuses a dequantized bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.node_names import block_of, kind_of, module_of

from .files import import_onnx
from .float16 import Change

LEVELS = 127
"""Symmetric INT8 uses −127…127."""
SMALLEST_SCALE = 2.0**-24
"""Float16's least positive number."""


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """A linear layer with constant weights."""

    node: int
    """Its index in the graph."""
    name: str
    """Its module, such as `blocks.3.attention.query`; the node's name if the module is unknown."""
    input: str
    weight: str
    channel_axis: int
    """The axis of the weights that runs along the outputs."""

    @property
    def block(self) -> str:
        """`blocks.3`."""
        return block_of(self.name)

    @property
    def kind(self) -> str:
        """`attention.query`."""
        return kind_of(self.name)


def linear_layers(model: Any) -> list[LinearLayer]:
    """Every linear layer of a graph, in its order."""
    float32 = import_onnx().TensorProto.FLOAT
    matrices = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == float32
    }
    layers: dict[str, LinearLayer] = {}
    for i, node in enumerate(model.graph.node):
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in matrices:
            continue
        options = {attribute.name: attribute.i for attribute in node.attribute}
        if options.get("transA"):
            continue
        name = module_of(node) or node.name
        if name in layers:
            name = f"{name} {node.name}"
        layers[name] = LinearLayer(
            node=i,
            name=name,
            input=node.input[0],
            weight=node.input[1],
            channel_axis=0 if options.get("transB") else 1,
        )
    return list(layers.values())


def quantize_layers(
    model: Any,
    layers: Sequence[LinearLayer],
    ranges: Mapping[str, tuple[float, float]],
    *,
    unsigned: bool,
) -> Change:
    """Make `layers` INT8, in place. `ranges`: activation → the range of its codes; then saturation.

    `unsigned`: activations are uint8 with a zero point, the form that processors multiply fastest;
    otherwise symmetric int8, the form that TensorRT takes. Symmetric scales are float16 numbers:
    they stay exact when the graph becomes float16 afterwards.
    """
    if not layers:
        return Change(changed=False, description="no linear layer is left to quantize")
    insertion = _Insertion(model)
    chosen = {layer.node: layer for layer in layers}
    nodes = list(model.graph.node)
    for i, node in enumerate(nodes):
        if i in chosen:
            layer = chosen[i]
            insertion.scope = list(node.metadata_props)
            codes = activation_codes(*ranges[layer.input], unsigned=unsigned)
            node.input[0] = insertion.activation(layer.input, *codes)
            node.input[1] = insertion.weight(layer, rounded=not unsigned)
        insertion.nodes.append(node)
    insertion.finish()
    return Change(changed=True, description=f"{len(layers)} linear layers to INT8")


def activation_codes(
    low: float, high: float, *, unsigned: bool
) -> tuple[np.float32, NDArray[np.generic]]:
    """Scale and zero point of a range. Zero has an exact code, because windows are padded."""
    if not unsigned:
        step = _float16_up(np.array(max(-low, high) / LEVELS))
        return np.float32(step), np.array(0, np.int8)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    return np.float32(scale), np.array(round(-low / scale), np.uint8)


def weight_codes(
    weights: NDArray[np.float32], channel_axis: int, *, rounded: bool
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """INT8 codes of a matrix and the scale of each output channel."""
    top = np.abs(weights).max(axis=1 - channel_axis) / LEVELS
    scales = _float16_up(top) if rounded else np.maximum(top, SMALLEST_SCALE).astype(np.float32)
    spread = scales[None] if channel_axis == 1 else scales[:, None]
    codes = np.clip(np.rint(weights / spread), -LEVELS, LEVELS).astype(np.int8)
    return codes, scales


def _float16_up(values: NDArray[Any]) -> NDArray[np.float32]:
    """The least positive float16 numbers that are at least `values`, as float32."""
    least = np.maximum(values, SMALLEST_SCALE)
    near = least.astype(np.float16)
    up = np.where(near.astype(np.float64) < least, np.nextafter(near, np.float16(np.inf)), near)
    return np.asarray(up, np.float32)


class _Insertion:
    """A graph while Q/DQ is inserted; all readers of a value share one pair."""

    def __init__(self, model: Any) -> None:
        self.onnx = import_onnx()
        self.graph = model.graph
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.dequantized: dict[str, str] = {}
        """A value or weight → its dequantized form."""
        self.tensors: list[Any] = []
        self.scope: list[Any] = []
        """The exporter's metadata of the current layer: its Q/DQ belong to the same block."""
        self.nodes: list[Any] = []

    def activation(self, name: str, scale: np.float32, zero: NDArray[np.generic]) -> str:
        """The dequantized form of a value."""
        if name not in self.dequantized:
            inputs = [self._tensor(f"{name}_scale", scale), self._tensor(f"{name}_zero", zero)]
            self._node("QuantizeLinear", [name, *inputs], f"{name}_codes")
            self.dequantized[name] = self._node(
                "DequantizeLinear", [f"{name}_codes", *inputs], f"{name}_dequantized"
            )
        return self.dequantized[name]

    def weight(self, layer: LinearLayer, *, rounded: bool) -> str:
        """The dequantized form of a layer's weights."""
        name = layer.weight
        if name not in self.dequantized:
            values = self.onnx.numpy_helper.to_array(self.weights[name])
            codes, scales = weight_codes(values, layer.channel_axis, rounded=rounded)
            inputs = [
                self._tensor(f"{name}_codes", codes),
                self._tensor(f"{name}_scale", scales),
                self._tensor(f"{name}_zero", np.zeros(scales.shape, np.int8)),
            ]
            self.dequantized[name] = self._node(
                "DequantizeLinear", inputs, f"{name}_dequantized", axis=layer.channel_axis
            )
        return self.dequantized[name]

    def finish(self) -> None:
        """Put nodes and tensors into the graph, without weights that are no longer read."""
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        weights = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*weights, *self.tensors])

    def _tensor(self, name: str, values: Any) -> str:
        self.tensors.append(self.onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **options: int) -> str:
        node = self.onnx.helper.make_node(operator, inputs, [output], name=output, **options)
        node.metadata_props.extend(self.scope)
        self.nodes.append(node)
        return output
