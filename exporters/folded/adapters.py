"""The paper's adapters → the linear layers beside them: foldings 1 (MLP), 2 (Space), 8 (HyP-Adpt).

The Depth adapter is folded in `sd_trans.py`, with the branch that it belongs to.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.adapters import Adapter
from medsa_deploy.exporters.hyper_prompt_adapter import HyperPromptAdapter

from .linear import composed, constant, linear, stacked, summed


def widened_mlp(lin1: nn.Linear, lin2: nn.Linear, adapter: Adapter | None) -> nn.Sequential:
    """Folding 1: an MLP and the adapter beside it, which share input and GELU, as one wider MLP.

    lin2(GELU(lin1 n)) + 0.5 · fc2(GELU(fc1 n)) = [lin2, 0.5·fc2] GELU([lin1; fc1] n)
    """
    if adapter is not None:
        lin1, lin2 = stacked(lin1, adapter.D_fc1), summed(lin2, adapter.D_fc2, 0.5)
    return nn.Sequential(linear(lin1.weight, lin1.bias), nn.GELU(), linear(lin2.weight, lin2.bias))


class AdaptedProjection(nn.Module):
    """Folding 2: output projection p and Space adapter p + fc2(GELU(fc1 p)), with one GEMM less.

    fc1 ∘ projection is linear, so [projection; fc1 ∘ projection] is one GEMM.
    """

    def __init__(self, projection: nn.Linear, fc1: nn.Linear, fc2: nn.Linear) -> None:
        super().__init__()
        self.wide = stacked(projection, composed(fc1, projection))
        self.fc2 = linear(fc2.weight, fc2.bias)
        self.widths = (projection.out_features, fc1.out_features)

    def forward(self, a: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        p, hidden = self.wide(a).split(self.widths, dim=-1)
        return p + self.fc2(F.gelu(hidden))


def with_skips(*adapters: Adapter | None) -> nn.Sequential:
    """The adapters that there are, each as a residual step, in their order."""
    steps = []
    for adapter in adapters:
        if adapter is not None:
            step = Adapter(adapter.D_fc1.in_features, adapter.D_fc1.out_features, skip=True)
            step.D_fc1, step.D_fc2 = adapter.D_fc1, adapter.D_fc2
            steps.append(step)
    return nn.Sequential(*steps)


class AdaptedMLP(nn.Module):
    """The block's ReLU MLP, and its adapter beside it, whose GELU keeps the two apart."""

    def __init__(self, mlp: nn.Module, adapter: Adapter | None) -> None:
        super().__init__()
        self.mlp = mlp
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 256) → (B, T, 256)."""
        y = self.mlp(x)
        return y if self.adapter is None else y + 0.5 * self.adapter(x)


class FoldedHyperPromptAdapter(nn.Module):
    """HyP-Adpt with the hyper-weights of the fixed tokens as constants (folding 8)."""

    def __init__(self, adapter: HyperPromptAdapter, fixed: Tensor) -> None:
        super().__init__()
        self.lengths = adapter.lengths
        self.down, self.reduce, self.up = adapter.D_fc1, adapter.P_fc, adapter.D_fc2
        self.hyper, self.norms = adapter.hyper, adapter.norms
        reduced = adapter.P_fc(fixed)
        self.fixed = len(fixed)
        self.constants = nn.ParameterList(
            constant(hyper(reduced).unflatten(-1, pair))
            for hyper, pair in zip(adapter.hyper, self._pairs(), strict=True)
        )

    def _pairs(self) -> list[tuple[int, int]]:
        return list(pairwise(self.lengths))

    def forward(self, x: Tensor, query_pe: Tensor) -> Tensor:
        """x, query_pe (B, T, 256), the fixed tokens first → (B, T, 256)."""
        e = self.down(x)
        r = self.reduce(query_pe[:, self.fixed :])
        steps = zip(self.hyper, self.norms, self.constants, self._pairs(), strict=True)
        for hyper, norm, weights, pair in steps:
            fixed, prompted = e[:, : self.fixed, None], e[:, self.fixed :, None]
            e = torch.cat([fixed @ weights, prompted @ hyper(r).unflatten(-1, pair)], dim=1)
            e = F.relu(norm(e.squeeze(-2)))
        return x + self.up(e)
