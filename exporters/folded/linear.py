"""Linear algebra of folding: layers made from the weights of other layers, computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer holding weight (out, in) and bias (out,), in float32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float().contiguous(), requires_grad=False)
    return layer


def constant(value: Tensor) -> nn.Parameter:
    """A tensor that becomes an initializer of the graph, in float32."""
    return nn.Parameter(value.detach().float().contiguous(), requires_grad=False)


def stacked(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """x ↦ [first(x), second(x)]."""
    return linear(torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias]))


def summed(first: nn.Linear, second: nn.Linear, scale: float) -> nn.Linear:
    """[x, y] ↦ first(x) + scale · second(y)."""
    return linear(
        torch.cat([first.weight, scale * second.weight], dim=1), first.bias + scale * second.bias
    )


def composed(outer: nn.Linear, inner: nn.Linear) -> nn.Linear:
    """x ↦ outer(inner(x))."""
    weight, bias = outer.weight.double(), outer.bias.double()
    return linear(weight @ inner.weight.double(), weight @ inner.bias.double() + bias)


def merged_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Folding 10: a convolution without bias and the batch norm after it, as one convolution."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    merged = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        device="meta",
    )
    merged.weight = constant(conv.weight.double() * scale[:, None, None, None])
    merged.bias = constant(norm.bias.double() - norm.running_mean.double() * scale)
    return merged


def layer_norm(norm: nn.Module) -> nn.LayerNorm:
    """SAM's LayerNorm2d as a LayerNorm over the last axis."""
    folded = nn.LayerNorm(len(norm.weight), eps=norm.eps)
    folded.weight, folded.bias = norm.weight, norm.bias
    return folded
