"""EfficientSAM's encoder, prompt encoder and mask decoder, as a checkpoint carries them."""

from __future__ import annotations

import math
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.families.sam_vit import reference as sam_vit
from medsa_deploy.exporters.reference.decoder import TwoWayTransformer, paired
from medsa_deploy.exporters.shapes import Shapes


class ImageEncoder(sam_vit.ImageEncoder):
    """SAM's ViT, with another eps; the table of positions has a class token before its 14×14."""

    EPS = 1e-5

    def position_table(self) -> Tensor:
        """(1, 197, C) → (1, 14, 14, C)."""
        side = isqrt(self.pos_embed.shape[1] - 1)
        return self.pos_embed[:, 1:].unflatten(1, (side, side))


class PromptTokens(nn.Module):
    """Points with labels −1 (invalid), 0, 1, 2, 3; every point keeps its positional encoding.

    There is no padding token and no mask prompt.
    """

    def __init__(self, shapes: Shapes, *, image_size: int, embedding_size: int) -> None:
        super().__init__()
        prefix = "prompt_encoder"
        width = shapes[f"{prefix}.invalid_points.weight"][1]
        self.image_size = image_size
        self.embedding_size = embedding_size
        self.pe_layer = Positions(shapes[f"{prefix}.pe_layer.positional_encoding_gaussian_matrix"])
        self.invalid_points = nn.Embedding(1, width)
        self.point_embeddings = nn.Embedding(1, width)
        self.bbox_top_left_embeddings = nn.Embedding(1, width)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, width)

    def kinds(self) -> dict[int, Tensor]:
        """Label → embedding; background, 0, adds nothing."""
        return {
            -1: self.invalid_points.weight,
            1: self.point_embeddings.weight,
            2: self.bbox_top_left_embeddings.weight,
            3: self.bbox_bottom_right_embeddings.weight,
        }

    def sparse(self, coords: Tensor, labels: Tensor) -> Tensor:
        """coords (P, N, 2) in network pixels, labels (P, N) → (P, N, 256)."""
        encoded = self.pe_layer((coords + 0.5) / self.image_size)
        for label, embedding in self.kinds().items():
            encoded = torch.where(labels[..., None] == label, encoded + embedding, encoded)
        return encoded

    def dense(self, mask_input: Tensor | None) -> None:
        """Nothing is added to the embedding, since there are no mask prompts."""

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the embedding's grid: (1, 256, g, g)."""
        centres = (torch.arange(self.embedding_size) + 0.5) / self.embedding_size
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]


class Positions(nn.Module):
    """SAM's random Fourier features of coordinates in 0…1."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.empty(shape))

    def forward(self, coords: Tensor) -> Tensor:
        """(…, 2) → (…, 256)."""
        angles = 2 * math.pi * ((2 * coords - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Decoder(nn.Module):
    """Two-way transformer in the public form, upscaling with a group norm, GELU throughout."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        prefix = "mask_decoder"
        mask_tokens, width = shapes[f"{prefix}.mask_tokens.weight"]
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(mask_tokens, width)
        self.transformer = TwoWayTransformer(shapes, form="public", act=nn.GELU)
        upscaling = f"{prefix}.final_output_upscaling_layers"
        first, second = (shapes[f"{upscaling}.{i}.0.weight"] for i in range(2))
        self.final_output_upscaling_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(first[0], first[1], 2, stride=2),
                    nn.GroupNorm(1, first[1]),
                    nn.GELU(),
                ),
                nn.Sequential(nn.ConvTranspose2d(second[0], second[1], 2, stride=2), nn.GELU()),
            ]
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(shapes, f"{prefix}.output_hypernetworks_mlps.0") for _ in range(mask_tokens)
        )
        self.iou_prediction_head = MLP(shapes, f"{prefix}.iou_prediction_head")

    def forward(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: None = None
    ) -> tuple[Tensor, Tensor]:
        """image_embeddings (E, 256, g, g), sparse (P, N, 256) → low-resolution logits
        (max(E, P), M, 4g, 4g) and IoU predictions (max(E, P), M) of all M mask tokens."""
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        image, tokens = paired(image_embeddings, outputs, sparse)
        hs, keys = self.transformer(
            image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2), tokens
        )
        upscaled = keys.transpose(1, 2).reshape(image.shape)
        for layer in self.final_output_upscaling_layers:
            upscaled = layer(upscaled)
        hyper = torch.stack(
            [mlp(hs[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        return masks, self.iou_prediction_head(hs[:, 0])


class MLP(nn.Module):
    """fc(GELU(layers.1.0(GELU(layers.0.0(x)))))."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        hidden, width = shapes[f"{prefix}.layers.0.0.weight"]
        out = shapes[f"{prefix}.fc.weight"][0]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(inner, hidden)) for inner in (width, hidden)
        )
        self.fc = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C')."""
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.fc(x)


def prompts_and_decoder(network: Network, shapes: Shapes) -> tuple[PromptTokens, Decoder]:
    """The two modules of a network, without weights."""
    prompts = PromptTokens(
        shapes, image_size=network.image_size, embedding_size=network.embedding_size
    )
    return prompts, Decoder(shapes)
