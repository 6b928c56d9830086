"""A module → its operators, captured once for the ONNX exporter, and translated.

torch decomposes what it captures before it translates it, by tracing all of it twice more: half the
time of an export. Here that happens only if an operator has no translation. For every graph it also
reads the signatures of its 2,000 translations anew, and traces the graph once more for operands of
different types. Here the signatures are read once, and only graphs with such operands are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter import _fx_passes, _registration
from torch.overrides import TorchFunctionMode


class CapturedProgram(ExportedProgram):
    """A program that is not traced again if all of its operators can be translated as they are."""

    def run_decompositions(self, decomp_table: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The program; decomposed only if it has operators that `decomp_table` decomposes."""
        targets = {node.target for node in self.graph.nodes}
        if decomp_table is None or not targets.isdisjoint(decomp_table):
            return super().run_decompositions(decomp_table, *args, **kwargs)
        return self


def capture(
    module: nn.Module,
    examples: Sequence[Tensor],
    dynamic_shapes: Sequence[Mapping[int, str] | None],
) -> CapturedProgram:
    """The operators of a module; for each example, the axes whose sizes may vary."""
    # Keys of the cache of fake tensors cost more here than the tensors
    with SymbolicViews(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program = torch.export.export(
            module,
            tuple(examples),
            dynamic_shapes=tuple(
                dict.fromkeys(axes, Dim.DYNAMIC) if axes else None for axes in dynamic_shapes
            ),
            strict=False,
        )
    return CapturedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )


@contextmanager
def quick_translation() -> Iterator[None]:
    """Have torch read its translations once in a process, and trace what has mixed types only."""
    with (
        patch.object(_registration.ONNXRegistry, "from_torchlib", staticmethod(_read_translations)),
        patch.object(_fx_passes, "insert_type_promotion_nodes", _promote_mixed_types),
    ):
        yield


_from_torchlib = _registration.ONNXRegistry.from_torchlib
_insert_promotions = _fx_passes.insert_type_promotion_nodes
TYPED = frozenset({"_to_copy", "where", "index", "index_select", "gather", "embedding"})
"""Operators that cast, or whose conditions and indices have a type of their own."""


def _promote_mixed_types(graph_module: torch.fx.GraphModule) -> None:
    """Cast operands to the type that torch computes in, if any operator has two types."""
    if any(_has_mixed_types(node) for node in graph_module.graph.nodes):
        _insert_promotions(graph_module)


def _has_mixed_types(node: torch.fx.Node) -> bool:
    """Whether an operator reads or makes values of another type than its first operand's."""
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if node.op != "call_function" or name in TYPED:
        return False
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    types = {value.dtype for value in values if isinstance(value, Tensor)}
    result = node.meta.get("val")
    if types and isinstance(result, Tensor) and result.dtype is not torch.bool:
        types.add(result.dtype)
    has_fraction = any(isinstance(argument, float) for argument in node.args)
    return len(types) > 1 or (has_fraction and not all(kind.is_floating_point for kind in types))


@cache
def _read_translations(opset_version: int) -> Any:
    """torch's translations of operators into those of an opset."""
    return _from_torchlib(opset_version=opset_version)


class SymbolicViews(TorchFunctionMode):
    """Writes views and casts with the operators that they decompose into.

    The shapes of a reshape are computed once. `flatten` and `unflatten` would be translated into
    nodes that compute each shape again.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    first, last = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    axis = dim % x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _movedim(x: Tensor, source: Any, destination: Any) -> Tensor:
    if not isinstance(source, int):
        return x.movedim(source, destination)
    order = [axis for axis in range(x.ndim) if axis != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return x.permute(order)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1 or not isinstance(args[0], torch.dtype):
        return x.to(*args, **kwargs)
    return torch.ops.aten._to_copy.default(x, dtype=args[0])


REPLACEMENTS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.flatten: _flatten,
    Tensor.unflatten: _unflatten,
    Tensor.movedim: _movedim,
    Tensor.to: _to,
}
"""For each method that networks use, the operators that take its place."""
