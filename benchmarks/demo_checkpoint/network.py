"""The demonstration network: SAM's layout, small, made of the reference network's own modules.

`base_tensors` is a SAM before training, `adapter_tensors` what Med-SA adds to it; a `DemoNetwork`
holds either alone or both, and its state dict has a checkpoint's keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from medsa_deploy.exporters.families.sam_vit import reference as vit
from medsa_deploy.exporters.hyper_prompt_adapter import HyperPromptAdapter
from medsa_deploy.exporters.reference.decoder import Decoder, PromptTokens
from medsa_deploy.exporters.sam import modeling
from medsa_deploy.exporters.sd_trans import SDTrans
from medsa_deploy.exporters.shapes import Shapes

SIZE, PATCH = 256, 8
GRID = SIZE // PATCH
WIDTH, DEPTH, HEADS = 128, 8, 2
WINDOW, GLOBAL = 8, (3, 7)
PROMPT_WIDTH = 256
CHUNK = 8
"""Slices that SD-Trans sees together."""
CLASSES = ("white matter", "grey matter", "brain", "phantom")
PROMPTED = 3
"""The mask of what was prompted, of the base; the first three are tissues."""
HYP_LENGTHS, HYP_PROMPT = (64, 32, 64), 32
"""HyP-Adpt: widths L_0…L_K, and that of the reduced prompt."""

HEADS_OF_OUTPUT = re.compile(
    r"mask_decoder\.(mask_tokens|output_hypernetworks_mlps|output_upscaling|iou_prediction_head)\."
)
"""What makes the classes' masks: trained with the adapters, since the base knows no classes."""
RECONSTRUCTION = "reconstruction."
"""Prefix of the keys of what helps to train the base, and is no part of it."""
POSITION_GAIN = 1.5
"""How much larger than usual projections start that match positions."""
DETAIL = PATCH // 2
"""Side of what is reconstructed of a patch: means of 2×2 pixels, as fine as the masks."""


class DemoNetwork(nn.Module):
    """Image, prompts → logits; with Depth adapters, B counts whole chunks of slices."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        shapes = Shapes({key: tuple(value.shape) for key, value in tensors.items()})
        deep = "image_encoder.blocks.0.Depth_Adapter.D_fc1.weight" in shapes
        self.image_encoder = vit.ImageEncoder(
            shapes,
            heads=HEADS,
            window=WINDOW,
            global_blocks=GLOBAL,
            sd_trans=SDTrans(grouping="public", chunk=CHUNK) if deep else None,
        )
        self.prompt_encoder = PromptTokens(shapes, image_size=SIZE, embedding_size=GRID)
        self.mask_decoder = Decoder(shapes, form="meta")
        self.reconstruction = (
            nn.Conv2d(PROMPT_WIDTH, DETAIL**2, kernel_size=1)
            if any(key.startswith(RECONSTRUCTION) for key in tensors)
            else None
        )
        self.load_state_dict(dict(tensors))

    def forward(self, image: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S), coords (P, N, 2) as the decoder takes them, labels (P, N), P = 1 for
        all images or k·B, k in turn for each → low-resolution logits (max(B, P), 4, 4g, 4g) and
        IoU predictions (max(B, P), 4)."""
        return self.decode(self.image_encoder(image), coords, labels)

    def decode(self, embeddings: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same of images that are encoded already, (B, 256, g, g)."""
        # training also takes images of half the size; positions are relative to the image's
        self.prompt_encoder.image_embedding_size = tuple(embeddings.shape[2:])
        each = max(1, len(coords) // len(embeddings))
        return self.mask_decoder(
            embeddings.repeat_interleave(each, dim=0),
            self.prompt_encoder.get_dense_pe(),
            self.prompt_encoder.sparse(coords, labels),
            self.prompt_encoder.dense(None),
        )

    @contextmanager
    def without_depth(self) -> Iterator[None]:
        """SD-Trans switched off: every slice by itself, as a 2D export runs it."""
        blocks = [block for block in self.image_encoder.blocks if block.sd_trans is not None]
        branches = [block.sd_trans for block in blocks]
        for block in blocks:
            block.sd_trans = None
        try:
            yield
        finally:
            for block, sd_trans in zip(blocks, branches, strict=True):
                block.sd_trans = sd_trans

    @contextmanager
    def without_prompt_conditioning(self) -> Iterator[None]:
        """HyP-Adpt generates its weights from a prompt embedding of zeros."""
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1] * 0))
            for module in self.modules()
            if isinstance(module, HyperPromptAdapter)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def base_tensors(seed: int) -> dict[str, Tensor]:
    """A SAM of these sizes as SAM's own modules initialise it; its positions are not zero.

    With it comes a linear reconstruction of the image from the embeddings, for training alone.
    """
    torch.manual_seed(seed)
    parts = {
        "image_encoder": modeling.ImageEncoderViT(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            use_rel_pos=True,
            global_attn_indexes=GLOBAL,
            window_size=WINDOW,
            out_chans=PROMPT_WIDTH,
        ),
        "prompt_encoder": modeling.PromptEncoder(
            PROMPT_WIDTH, (GRID, GRID), (SIZE, SIZE), mask_in_chans=16
        ),
        "mask_decoder": modeling.MaskDecoder(
            transformer_dim=PROMPT_WIDTH,
            transformer=modeling.TwoWayTransformer(2, PROMPT_WIDTH, 8, 2048),
        ),
    }
    tensors = {
        f"{part}.{key}": value.detach().clone()
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    reconstruction = nn.Conv2d(PROMPT_WIDTH, DETAIL**2, kernel_size=1)
    for key, value in reconstruction.state_dict().items():
        tensors[RECONSTRUCTION + key] = value.detach().clone()
    # every file has SAM's 64×64 positions, whatever its image size
    tensors["image_encoder.pos_embed"] = 0.02 * torch.randn(1, 64, 64, WIDTH)
    return tensors | _matched_positions(tensors)


def _matched_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions, and attention between tokens and image that starts out matching them.

    Coordinates come with x and y swapped, as Med-SA's do, and among SAM's random frequencies no
    linear map undoes that; here a frequency (a, b) comes with (b, a), so swapping exchanges the
    halves of sines and cosines. Frequencies are spread down to a tenth of SAM's: low ones tell on
    which side of a corner a place lies.
    """
    pairs = torch.randn(2, PROMPT_WIDTH // 4) * torch.logspace(-1, 0, PROMPT_WIDTH // 4)
    matched = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.cat(
            [pairs, pairs.flip(0)], dim=1
        )
    }
    swapped = torch.arange(PROMPT_WIDTH).view(2, 2, -1).flip(1).flatten()
    for key, weight in tensors.items():
        if re.search(r"(token_to_image|image_to_token)\.q_proj\.weight", key):
            matched[key] = POSITION_GAIN * weight
            matched[key.replace("q_proj", "k_proj")] = POSITION_GAIN * weight[:, swapped]
    return matched


def adapter_tensors(seed: int) -> dict[str, Tensor]:
    """Fresh adapters; each ends in zeros, so that training starts at the base."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i in range(DEPTH):
        for kind in ("Space_Adapter", "MLP_Adapter", "Depth_Adapter"):
            tensors |= _bottleneck(f"image_encoder.blocks.{i}.{kind}", WIDTH)
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}"
        tensors |= _bottleneck(f"{layer}.MLP_Adapter", PROMPT_WIDTH)
        tensors |= _bottleneck(f"{layer}.Image_Adapter", PROMPT_WIDTH)
        hyper = HyperPromptAdapter(PROMPT_WIDTH, HYP_LENGTHS, HYP_PROMPT)
        for linear in hyper.hyper:
            nn.init.zeros_(linear.bias)  # all of a generated matrix comes from the prompt
        nn.init.zeros_(hyper.D_fc2.weight)
        nn.init.zeros_(hyper.D_fc2.bias)
        tensors |= {f"{layer}.HyP_Adapter.{k}": v for k, v in hyper.state_dict().items()}
    return tensors


def _bottleneck(prefix: str, width: int) -> dict[str, Tensor]:
    """An adapter of a quarter of the width whose second layer is zero."""
    first, second = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    return {
        f"{prefix}.{name}.{kind}": value.detach().clone()
        for name, layer in (("D_fc1", first), ("D_fc2", second))
        for kind, value in layer.state_dict().items()
    }


def is_trained_with_adapters(key: str) -> bool:
    """Whether the second stage trains this key; everything else is frozen with the base."""
    return "_Adapter." in key or HEADS_OF_OUTPUT.match(key) is not None


def save_container(tensors: Mapping[str, Tensor], path: Path, *, epoch: int, loss: float) -> None:
    """The public Med-SA code's training container, in half precision, renamed when whole."""
    temporary = path.with_suffix(".partial")
    container = {
        "epoch": epoch,
        "model": "sam",
        "state_dict": {key: value.half() for key, value in tensors.items()},
        "optimizer": {},
        "best_tol": loss,
        "path_helper": {"prefix": "medsa_demo"},
    }
    torch.save(container, temporary)
    temporary.replace(path)
