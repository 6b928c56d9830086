"""Networks whose modules are here before their export: golden ≙ reference ≙ folded, in torch.

SD-Trans encoders (both branches), and EfficientSAM's encoder, prompts and decoder with AdaLoRA.
"""

from __future__ import annotations

import re

import pytest
import torch
from golden_cases import GoldenCase, relative_l2

from medsa_deploy.exporters.folded import decoder as folded_decoder
from medsa_deploy.exporters.folded import vit as folded_vit
from medsa_deploy.exporters.lora import merge
from medsa_deploy.exporters.reference import efficient_sam, vit
from medsa_deploy.exporters.sd_trans import SDTrans
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.manifest import DepthGrouping

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


@pytest.mark.parametrize("name", ["medsa_efficient", "medsa_efficient_adalora"])
def test_efficient_sam_is_golden(name: str) -> None:
    case = GoldenCase(name)
    tensors = tensors_of(case)
    shapes = Shapes({key: tuple(value.shape) for key, value in tensors.items()})
    encoder = vit_of(case, None, heads=3, window=0, global_blocks=tuple(range(12)))
    prompts = efficient_sam.PromptTokens(shapes, image_size=256, embedding_size=16)
    decoder = efficient_sam.Decoder(shapes)
    filled(prompts, tensors, "prompt_encoder.")
    filled(decoder, tensors, "mask_decoder.")
    coords = torch.tensor(case.settings["points"])
    labels = torch.tensor(case.settings["labels"]).float()
    image = torch.from_numpy(case.image)

    embedding = encoder(image)
    sparse = prompts.sparse(coords, labels)
    masks, iou = decoder(embedding, prompts.get_dense_pe(), sparse)
    folded_embedding = folded_vit.ImageEncoder(encoder, 16)(image).detach()
    folded = folded_decoder.Decoder(prompts, decoder, 4)(folded_embedding, coords, labels)
    assert relative_l2(sparse.numpy(), case.expected["sparse_embeddings"]) <= LIMIT
    for e, m, i in ((embedding, masks, iou), (folded_embedding, *folded)):
        assert relative_l2(e.numpy(), case.expected["image_embeddings"]) <= LIMIT
        found = m[:, :1].detach().numpy()
        assert relative_l2(found, case.expected["low_res_logits"]) <= LIMIT
        assert relative_l2(i[:, :1].detach().numpy(), case.expected["iou_predictions"]) <= 3e-5
