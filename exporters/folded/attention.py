"""Attention over a grid of tokens, cut so that nothing is computed for padded tokens (folding 5).

The reference pads tokens to whole windows and then normalises and projects them. Everything before
the scores acts on single tokens, so here it runs on the H·W real ones, and a padded token's key and
value are constants: with u its normalised value (norm1.bias in Med-SA blocks, 0 in SAM's),

    k_pad = W_k u + b_k,    v_pad = W_v u + b_v.

Taking k_pad from every key shifts all scores of a query alike, which softmax ignores; taking v_pad
from every value shifts the output by v_pad, which moves into the bias of the projection after it.
So keys become W_k n − W_k u, values W_v n − W_v u, and padding is with zeros. Exact, and free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import constant, linear
from .sd_trans import DepthAttention


class GridAttention(nn.Module):
    """Multi-head attention on normalised tokens (B, H, W, C), in windows or over the whole grid.

    The output is before the projection. The softmax scale is folded into the query's weights.
    """

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        *,
        heads: int,
        window: int,
        scores: nn.Module,
        heads_at_once: int | None = None,
        depth: DepthAttention | None = None,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.heads = heads
        self.window = window
        """Side of a window in tokens; 0 attends over the whole grid."""
        self.scores = scores
        """(q, k) (M, heads, n, d) → attention scores (M, heads, n, n)."""
        self.heads_at_once = heads_at_once or heads
        """How many heads' scores over space are held at a time."""
        self.depth = depth
        """SD-Trans's branch, which reuses this attention's queries, keys and values."""

    def forward(self, n: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) → attention over space (B, H, W, C), over depth (B, H, W, C') or None."""
        grid = (n.shape[1], n.shape[2])
        q, k, v = (self._cut(layer(n)) for layer in (self.query, self.key, self.value))
        space = self._attend(q, k, v).transpose(1, 2).flatten(2)
        if self.depth is None:
            return self._join(space, grid), None
        depth = self.depth(q, k, v, windows=self._windows(grid))
        return self._join(space, grid), self._join(depth, grid)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(M, heads, n, d) three times → (M, heads, n, d)."""
        if self.heads_at_once >= self.heads:
            return self.scores(q, k).softmax(-1) @ v
        parts = zip(*(x.split(self.heads_at_once, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self.scores(*qk).softmax(-1) @ v for *qk, v in parts], dim=1)

    def _windows(self, grid: tuple[int, int]) -> int:
        """Windows a grid is cut into."""
        side = self.window
        return -(-grid[0] // side) * -(-grid[1] // side) if side else 1

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (M, heads, n, C/heads): windows with zeros beyond the grid's edge."""
        _, h, w, c = x.shape
        if not self.window:
            return x.view(-1, h * w, self.heads, c // self.heads).transpose(1, 2)
        side = self.window
        rows, columns = -(-h // side), -(-w // side)
        x = F.pad(x, (0, 0, 0, columns * side - w, 0, rows * side - h))
        x = x.view(-1, rows, side, columns, side, self.heads, c // self.heads)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, self.heads, side * side, c // self.heads)

    def _join(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(M, n, C) → (B, H, W, C): windows put together, and what lies beyond the grid cut off."""
        h, w = grid
        c = x.shape[-1]
        if not self.window:
            return x.view(-1, h, w, c)
        side = self.window
        rows, columns = -(-h // side), -(-w // side)
        x = x.view(-1, rows, columns, side, side, c).transpose(2, 3)
        return x.reshape(-1, rows * side, columns * side, c)[:, :h, :w]


class Scores(nn.Module):
    """q·k, and nothing else: for relative-position tables that are absent or all zero."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(M, heads, n, d) twice → (M, heads, n, n)."""
        return q @ k.transpose(-2, -1)


class BiasedScores(nn.Module):
    """q·k plus a bias that does not depend on the queries: TinyViT's."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = constant(bias)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(M, heads, n, d) twice → (M, heads, n, n)."""
        return q @ k.transpose(-2, -1) + self.bias


class RelativePositionScores(nn.Module):
    """q·k plus SAM's decomposed relative positions (folding 6): q·Rh[h−h'] + q·Rw[w−w'].

    With rh[i, h'] = q_i·Rh[h_i−h'] and rw likewise, [q, rh, rw] · [k, onehot(h'), onehot(w')] has
    exactly these scores, so no bias of the scores' own size is ever stored. The tables are resized
    and gathered once (folding 7); they multiply unscaled queries, so the softmax scale folded into
    q is taken out of them.
    """

    def __init__(self, rows: Tensor, columns: Tensor, grid: tuple[int, int], scale: float) -> None:
        super().__init__()
        h, w = self.grid = grid
        self.rows = constant(gathered(rows, h).transpose(1, 2) / scale)
        self.columns = constant(gathered(columns, w).transpose(1, 2) / scale)
        row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
        self.positions = constant(torch.cat([torch.eye(h)[row], torch.eye(w)[column]], dim=1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(M, heads, n, d) twice → (M, heads, n, n)."""
        tokens = q.unflatten(2, self.grid)
        rows = tokens @ self.rows
        columns = (tokens.transpose(2, 3) @ self.columns).transpose(2, 3)
        wide_q = torch.cat([q, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)
        positions = self.positions.expand(k.shape[0], k.shape[1], -1, -1)
        return wide_q @ torch.cat([k, positions], dim=-1).transpose(-2, -1)


def gathered(table: Tensor, n: int) -> Tensor:
    """Relative-position table → its entry for every pair of positions: (n, n, d), [i, j] ↦ i − j.

    A table of another length than 2n − 1 is resized linearly first, as SAM does.
    """
    length = 2 * n - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
    positions = torch.arange(n)
    return table[positions[:, None] - positions[None, :] + n - 1]


def folded_projections(
    qkv: nn.Linear, projection: nn.Linear, padded: Tensor, scale: float
) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output projection of a block, padded tokens folded away.

    qkv: (3C, C) with rows of q, k, v in turn; padded: (C,), the normalised value u of a padded
    token; scale: the softmax scale, folded into the query.
    """
    wq, wk, wv = qkv.weight.double().chunk(3)
    bq, _, bv = qkv.bias.double().chunk(3)
    u = padded.double()
    bias = projection.bias.double() + projection.weight.double() @ (wv @ u + bv)
    return (
        linear(scale * wq, scale * bq),
        linear(wk, -wk @ u) if u.any() else linear(wk),
        linear(wv, -wv @ u) if u.any() else linear(wv),
        linear(projection.weight, bias),
    )
