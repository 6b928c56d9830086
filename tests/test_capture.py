"""Capturing a module once: the same graph as torch's own way, and its way where that is needed."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from medsa_deploy.exporters.capture import (
    CapturedProgram,
    SymbolicViews,
    capture,
    quick_translation,
)


class Views(nn.Module):
    """Every method that is written otherwise while it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        joined = x.flatten(1).unflatten(-1, (2, -1)).movedim(-1, 1)
        return (
            joined.flatten(0, -2) * (x > 0).to(torch.float32).flatten(2).unflatten(1, (-1,)).sum()
        )


class Spread(nn.Module):
    """An operator without a translation: torch decomposes it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.entr(x) + x.flatten(1).unflatten(1, (-1, 4))


def exported(module: nn.Module, example: Tensor) -> tuple[ort.InferenceSession, CapturedProgram]:
    program = capture(module, [example], [{0: "B"}])
    model = torch.onnx.export(program, dynamo=True, dynamic_shapes=({0: "B"},), verbose=False)
    assert model is not None
    return ort.InferenceSession(model.model_proto.SerializeToString()), program


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "decomposed"), [(Views(), False), (Spread(), True)])
def test_a_program_is_decomposed_only_where_it_must_be(
    module: nn.Module, decomposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def recorded(self, *arguments, **options):
        calls.append(self)
        return decompose(self, *arguments, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", recorded)
    session, _ = exported(module, torch.rand(3, 6, 4))
    assert bool(calls) == decomposed
    for batch in (1, 2, 5):
        x = torch.rand(batch, 6, 4)
        (values,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(values, module(x).numpy(), rtol=1e-6, atol=1e-6)


class Fractions(nn.Module):
    """Whole numbers that become fractions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        counts = (4 * x).to(torch.int64)
        if self.kind == "beside a fraction":
            return counts * 0.5
        if self.kind == "compared with a fraction":
            return (counts > 0.5).to(torch.float32)
        return counts / counts.flatten(1)[:, :1, None] if self.kind == "divided" else counts + x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["beside a fraction", "compared with a fraction", "divided", "beside fractions"]
)
def test_mixed_types_are_computed_as_torch_does(kind: str) -> None:
    module, x = Fractions(kind), torch.rand(3, 6, 4) + 0.5
    with quick_translation():
        session, _ = exported(module, x)
    (values,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(values, module(x).numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_graph_is_that_of_torchs_own_translation() -> None:
    layer, models = nn.TransformerEncoderLayer(8, 2, 16).eval(), []
    for context in (nullcontext(), quick_translation()):
        program = capture(layer, [torch.rand(3, 5, 8)], [{}])
        with context:
            translated = torch.onnx.export(program, dynamo=True, verbose=False)
        assert translated is not None
        models.append(translated.model_proto.graph)
    theirs, ours = models
    assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
    assert [tensor.raw_data for tensor in ours.initializer] == [
        tensor.raw_data for tensor in theirs.initializer
    ]


def test_shapes_are_computed_once() -> None:
    """`flatten` and `unflatten` translated as they are would compute each shape again."""
    program = capture(Views(), [torch.rand(3, 6, 4)], [{0: "B"}])
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in names if "flatten" in name or "movedim" in name or ".to." in name}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.flatten(),
        lambda x: x.flatten(1),
        lambda x: x.flatten(-2, -1),
        lambda x: x.flatten(start_dim=1, end_dim=2),
        lambda x: x.unflatten(1, (2, 3)),
        lambda x: x.unflatten(-1, (-1, 2)),
        lambda x: x.movedim(0, -1),
        lambda x: x.movedim(-1, 1),
        lambda x: x.movedim((0, 1), (1, 2)),
        lambda x: x.to("cpu"),
        lambda x: x.to(dtype=torch.int32),
        lambda x: x.to(torch.float64),
    ],
)
def test_views_are_torchs(view) -> None:
    x = torch.arange(2.0 * 6 * 4).reshape(2, 6, 4)
    expected = view(x)
    with SymbolicViews():
        actual = view(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
