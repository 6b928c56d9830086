"""A checkpoint's keys → the paper's HyP-Adpt (Med-SA, arXiv 2304.12620, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .shapes import Shapes


class HyperPromptAdapter(nn.Module):
    """HyP-Adpt (section 3.4): weights generated from the prompt are applied to each token.

        W = Re(M(e_prompt)),   e_{n+1} = ReLU(Norm(e_n ⊗ W))

    `lengths` are L_0…L_K, the widths of e; `prompt_length` is the width of the reduced prompt.
    """

    def __init__(self, width: int, lengths: Sequence[int], prompt_length: int) -> None:
        super().__init__()
        self.lengths = tuple(lengths)
        pairs = list(pairwise(lengths))
        self.D_fc1 = nn.Linear(width, lengths[0])
        self.P_fc = nn.Linear(width, prompt_length)
        self.hyper = nn.ModuleList(nn.Linear(prompt_length, a * b) for a, b in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(b) for _, b in pairs)
        self.D_fc2 = nn.Linear(lengths[-1], width)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x, prompt: (B, T, C); prompt holds the tokens as first embedded."""
        e = self.D_fc1(x)
        r = self.P_fc(prompt)
        pairs = pairwise(self.lengths)
        for hyper, norm, (a, b) in zip(self.hyper, self.norms, pairs, strict=True):
            w = hyper(r).unflatten(-1, (a, b))
            e = F.relu(norm((e.unsqueeze(-2) @ w).squeeze(-2)))
        return x + self.D_fc2(e)


def hyper_prompt_adapter(shapes: Shapes, prefix: str) -> HyperPromptAdapter | None:
    """The HyP-Adpt module a checkpoint holds under `prefix`; None if it holds none."""
    weight = shapes.get(f"{prefix}.D_fc1.weight")
    if weight is None:
        return None
    lengths = [weight[0]]
    while (norm := shapes.get(f"{prefix}.norms.{len(lengths) - 1}.weight")) is not None:
        lengths.append(norm[0])
    return HyperPromptAdapter(weight[1], lengths, shapes[f"{prefix}.P_fc.weight"][0])
