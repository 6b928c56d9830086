"""A checkpoint's keys → the paper's bottleneck adapters (Med-SA, arXiv 2304.12620, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .shapes import Shapes


class Adapter(nn.Module):
    """Bottleneck adapter (section 3.2): fc2(GELU(fc1(x))), with or without a skip connection."""

    def __init__(self, width: int, hidden: int, *, skip: bool) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(width, hidden)
        self.D_fc2 = nn.Linear(hidden, width)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        y = self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + y if self.skip else y


def adapter(shapes: Shapes, prefix: str, *, skip: bool) -> Adapter | None:
    """The adapter a checkpoint holds under `prefix`, sized by its shapes; None if it holds none."""
    weight = shapes.get(f"{prefix}.D_fc1.weight")
    return None if weight is None else Adapter(weight[1], weight[0], skip=skip)
