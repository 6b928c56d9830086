"""A base's weights → how well white matter is read linearly out of what the base makes of a slice.

It tells before the adapters are trained whether they have anything to work with: what is frozen
and lost cannot be adapted. Fitted by ridge regression to CHUNK training slices, read on the
validation block, at the masks' resolution.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import GAP, LABEL_THRESHOLD, VALIDATION_BLOCKS, Template
from .network import CHUNK, DETAIL, DemoNetwork

RIDGE = 1.0


@torch.inference_mode()
def readouts(base: Mapping[str, Tensor]) -> dict[str, float]:
    """Dice of white matter read out of the last block, the neck, and the upscaled embeddings.

    The upscaled ones are read as the masks are, one place at a time; the others give a token's
    DETAIL×DETAIL places together.
    """
    network = DemoNetwork(base).eval()
    start = VALIDATION_BLOCKS[0].stop + GAP
    fitted, read = (
        _outputs(network, block) for block in (range(start, start + CHUNK), VALIDATION_BLOCKS[0])
    )
    return {name: _dice(*fitted[name], *read[name]) for name in ("last block", "neck", "upscaled")}


def _outputs(network: DemoNetwork, block: range) -> dict[str, tuple[Tensor, Tensor]]:
    """Features (n, C) and white matter (n, places) by where they are read."""
    grey, white, _ = torch.from_numpy(Template().network_frame_of(block))
    label = F.avg_pool2d((white >= LABEL_THRESHOLD / 255).float()[:, None], 2)
    tokens = F.pixel_unshuffle(label, DETAIL)
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
        for name, module in (
            ("last block", network.image_encoder.blocks[-1]),
            ("neck", network.image_encoder.neck),
            ("upscaled", network.mask_decoder.output_upscaling),
        )
    ]
    size = float(grey.shape[-1])
    box = torch.tensor([[[0.15, 0.15], [0.85, 0.85]]]) * size
    network(grey[:, None].expand(-1, 3, -1, -1), box, torch.tensor([[2.0, 3.0]]))
    for hook in hooks:
        hook.remove()
    outputs["last block"] = outputs["last block"].permute(0, 3, 1, 2)
    return {
        name: (
            output.movedim(1, -1).flatten(0, 2).double(),
            (label if name == "upscaled" else tokens).movedim(1, -1).flatten(0, 2).double(),
        )
        for name, output in outputs.items()
    }


def _dice(x: Tensor, label: Tensor, other_x: Tensor, other_label: Tensor) -> float:
    """Fit labels linearly to x, and compare what is read of other_x with its labels."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, other_x = (x - mean) / deviation, (other_x - mean) / deviation
    fit = torch.linalg.solve(
        x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (label - label.mean())
    )
    mask, true = other_x @ fit + label.mean() > 0.5, other_label > 0.5
    return float(2 * (mask & true).sum() / (mask.sum() + true.sum()))
