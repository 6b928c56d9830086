"""SD-Trans's depth branch with its Depth adapter, folded (foldings 3 and 4)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.exporters.sd_trans import SDTrans


class DepthAttention(nn.Module):
    """SD-Trans's attention over depth, up to the hidden layer of its adapter.

    It shares norm1 and qkv with the space branch, so it reuses that branch's queries, keys and
    values, regrouped (folding 4); and since the Depth adapter has no skip, only fc1 ∘ projection
    is needed of the projection, a quarter as wide (folding 3). What is regrouped back is that.
    """

    def __init__(self, sd_trans: SDTrans, scores: nn.Module, narrow: nn.Linear) -> None:
        super().__init__()
        self.sd_trans = sd_trans
        self.scores = scores
        self.narrow = narrow

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, windows: int) -> Tensor:
        """(M, heads, n, e) three times → GELU(fc1(projection)), (M, n, C/4)."""
        heads = q.shape[1]
        q, k, v = (self.sd_trans.group(x, windows).flatten(1, 2) for x in (q, k, v))
        y = (self.scores(q, k).softmax(-1) @ v).unflatten(1, (heads, -1))
        hidden = F.gelu(self.narrow(y.permute(0, 2, 3, 1, 4).flatten(3)))
        return self.sd_trans.ungroup(hidden, windows)
