"""Masks equal those of `segment_anything`'s own SamPredictor, for every kind of prompt."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from medsa_deploy import Session, load, stages
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.exporters.sam import modeling

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
MOST_DIFFERING = 1e-4
"""Share of a mask's pixels: logits of a random network are close to 0 in many places."""
SIZES = [256, *(pytest.param(size, marks=pytest.mark.slow) for size in (512, 1024))]
IMAGES = {"square": (200, 200), "tall": (230, 90), "wide": (80, 300)}


def random_sam(size: int) -> Any:
    """A small SAM with random weights, tables and positions included."""
    torch.manual_seed(size)
    side = size // 16
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=2, embed_dim=64, img_size=size, mlp_ratio=2, num_heads=2, patch_size=16,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True,
            global_attn_indexes=[1], window_size=7, out_chans=256,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(side, side), input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3, transformer_dim=256, iou_head_depth=3,
            iou_head_hidden_dim=256,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8
            ),
        ),
        pixel_mean=MEAN,
        pixel_std=STD,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in sam.parameters():
            if not parameter.any():  # positions and tables begin at 0
                parameter.normal_(std=0.02)
    return sam.eval()


@pytest.fixture(scope="module")
def predictor_class() -> Iterator[Any]:
    """SamPredictor, with the two functions of torchvision that it calls made of Pillow."""

    def resize(picture: PIL.Image.Image, size: list[int]) -> PIL.Image.Image:
        return picture.resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)

    parts: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {
            "resize": resize,
            "to_pil_image": PIL.Image.fromarray,
        },
    }
    names = [name for name in sys.modules if name.split(".")[0] in ("torchvision",)]
    earlier = {name: sys.modules.pop(name) for name in names}
    for name, values in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        from segment_anything import SamPredictor

        yield SamPredictor
    finally:
        for name in (*parts, *(n for n in sys.modules if n.startswith("segment_anything"))):
            if name in parts or "modeling" not in name:
                sys.modules.pop(name, None)
        sys.modules.update(earlier)


@pytest.fixture(scope="module", params=SIZES)
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    predictor_class: Callable[[Any], Any],
) -> Iterator[tuple[Session, Any]]:
    """A session on a random network's bundle, and SAM's predictor on the network."""
    sam = random_sam(request.param)
    path = tmp_path_factory.mktemp("predictor") / "sam.pth"
    torch.save(sam.state_dict(), path)
    overrides = Overrides(heads=2, window_size=7, global_blocks=(1,), preprocess="sam")
    exported = stages.export_checkpoint(
        path, output=None, base=None, images=None, overrides=overrides, force=False
    )
    with load(exported.bundle) as session:
        yield session, predictor_class(sam)


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
def test_every_kind_of_prompt(
    pair: tuple[Session, Any], shape: tuple[int, int], colour: bool
) -> None:
    session, predictor = pair
    height, width = shape
    rng = np.random.default_rng(height)
    blocks = rng.integers(0, 255, (height // 10, width // 10, 3 if colour else 1), np.uint8)
    image = blocks.repeat(10, axis=0).repeat(10, axis=1)
    predictor.set_image(np.broadcast_to(image, (*image.shape[:2], 3)).copy())
    embedding = session.encode(image)
    height, width = image.shape[:2]
    points = np.array([[width * 0.3, height * 0.6], [width * 0.7, height * 0.2]])
    labels = np.array([1, 0])
    box = np.array([width * 0.1, height * 0.2, width * 0.8, height * 0.9])
    _, _, logits = predictor.predict(point_coords=points, point_labels=labels)
    mask = logits[:1] * 3 + rng.normal(size=logits[:1].shape)
    kinds: dict[str, dict[str, Any]] = {
        "point": {"points": points[:1], "labels": labels[:1]},
        "points": {"points": points, "labels": labels},
        "box": {"box": box},
        "points and box": {"points": points, "labels": labels, "box": box},
        "mask": {"mask": mask[0]},
        "mask and points": {"mask": mask[0], "points": points, "labels": labels},
        "mask and box": {"mask": mask[0], "box": box},
        "all": {"mask": mask[0], "points": points, "labels": labels, "box": box},
    }
    for kind, prompt in kinds.items():
        for multimask in (False, True):
            expected, scores, low = predictor.predict(
                point_coords=prompt.get("points"),
                point_labels=prompt.get("labels"),
                box=prompt.get("box"),
                mask_input=mask if "mask" in prompt else None,
                multimask_output=multimask,
            )
            prediction = session.segment(embedding, multimask=multimask, **prompt)
            masks = np.asarray(prediction.masks)[0]
            assert masks.shape == expected.shape, kind
            assert (masks != expected).mean() <= MOST_DIFFERING, (kind, multimask)
            error = np.linalg.norm(prediction.low_res_logits[0] - low) / np.linalg.norm(low)
            assert error < 1e-4, (kind, multimask, error)
            np.testing.assert_allclose(prediction.scores[0], scores, atol=1e-4)
