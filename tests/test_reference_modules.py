"""Networks whose modules are here before their export: golden ≙ reference ≙ folded, in torch.

SD-Trans encoders, both branches.
"""

from __future__ import annotations

import re

import pytest
import torch
from golden_cases import GoldenCase, relative_l2

from medsa_deploy.bundle.manifest import DepthGrouping
from medsa_deploy.exporters.families.sam_vit import folded as folded_vit
from medsa_deploy.exporters.families.sam_vit import reference as vit
from medsa_deploy.exporters.lora import merge
from medsa_deploy.exporters.sd_trans import SDTrans
from medsa_deploy.exporters.shapes import Shapes

LIMIT = 3e-6


def tensors_of(case: GoldenCase) -> dict[str, torch.Tensor]:
    named = {
        re.sub(r"\.rel_([hw])$", r".rel_pos_\1", key): torch.from_numpy(value)
        for key, value in case.state_dict.items()
    }
    return merge(named)[0]


def filled(module: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Load the part of a checkpoint under `prefix`; only unused depth adapters may be left over."""
    part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    left = module.load_state_dict(part, strict=False)
    assert not left.missing_keys
    assert not [key for key in left.unexpected_keys if "Depth_Adapter" not in key]
    module.eval().requires_grad_(False)


def vit_of(case: GoldenCase, sd_trans: SDTrans | None, **sizes: object) -> vit.ImageEncoder:
    tensors = tensors_of(case)
    shapes = Shapes({key: tuple(value.shape) for key, value in tensors.items()})
    encoder = vit.ImageEncoder(shapes, sd_trans=sd_trans, **sizes)
    filled(encoder, tensors, "image_encoder.")
    return encoder


@pytest.mark.parametrize("grouping", ["public", "paper"])
def test_folded_chunks_are_the_references(grouping: DepthGrouping) -> None:
    """Two chunks at once, in both groupings; each chunk is by itself."""
    case = GoldenCase("medsa_hyp_3d")
    sd_trans = SDTrans(grouping=grouping, chunk=2)
    encoder = vit_of(case, sd_trans, heads=4, window=14, global_blocks=(1, 3))
    image = torch.from_numpy(case.image)
    expected = encoder(image).numpy()
    folded = folded_vit.ImageEncoder(encoder, case.size // 16)
    assert relative_l2(folded(image).detach().numpy(), expected) <= LIMIT
    alone = torch.cat([encoder(part) for part in image.split(2)])
    assert relative_l2(alone.numpy(), expected) <= LIMIT


def test_paper_grouping_is_its_direct_formulation() -> None:
    """Window by window over slices, written as loops over a windowed block."""
    case = GoldenCase("medsa_hyp_3d")
    d, grid, window = 4, case.size // 16, 14
    encoder = vit_of(
        case, SDTrans(grouping="paper", chunk=d), heads=4, window=window, global_blocks=(1, 3)
    )
    block = encoder.blocks[0]
    x = torch.randn(d, grid, grid, 96, generator=torch.Generator().manual_seed(3))
    padded = torch.zeros(d, 2 * window, 2 * window, 96)
    padded[:, :grid, :grid] = x
    branch = torch.zeros_like(padded)
    for row in range(2 * window):
        for column in range(2 * window):
            n = block.norm1(padded[:, row, column])
            y = block.Depth_Adapter(block.attn(n.view(1, 1, 4, 96)))
            branch[:, row, column] = y.view(d, 96)
    # What the block adds to x before its MLP is the space branch plus this.
    together = block._space_of_windows(x)
    sd_trans, block.sd_trans = block.sd_trans, None
    space = block._space_of_windows(x)
    block.sd_trans = sd_trans
    assert relative_l2((together - space).numpy(), branch[:, :grid, :grid].numpy()) <= 1e-5
