"""A module → its operators, captured once for the ONNX exporter.

torch decomposes what it captures before it translates it, by tracing all of it twice more: half the
time of an export. Here that happens only if an operator has no translation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
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
    with SymbolicViews():
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
