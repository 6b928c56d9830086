"""Prompt encoder, HyP-Adpt and mask decoder in one graph: embedding and prompts → masks.

Made from the reference decoder and equal to it. Folded: the dense positional encoding into each
image-side projection and the 0.5 and scaling of coordinates (folding 7); the hyper-weights of the
fixed tokens (folding 8); the hypernetwork MLPs of the masks that leave, as one batched MLP.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.manifest import TwoWay
from medsa_deploy.exporters.adapters import Adapter, HyperPromptAdapter
from medsa_deploy.exporters.reference import decoder as reference
from medsa_deploy.exporters.reference import efficient_sam
from medsa_deploy.exporters.sam import TwoWayAttention

from .linear import constant, linear
from .upscaling import Upscaling, upscaling
from .vit import layer_norm

LABELS = (-1, 0, 1, 2, 3)
"""Padding, background, foreground, first and second corner of a box."""


class SparsePrompts(nn.Module):
    """Points and labels → prompt tokens."""

    def __init__(self, prompts: reference.PromptTokens | efficient_sam.PromptTokens) -> None:
        super().__init__()
        gaussian = prompts.pe_layer.positional_encoding_gaussian_matrix
        self.across, self.down = map(constant, 2 * math.pi * gaussian)
        if isinstance(prompts, efficient_sam.PromptTokens):
            size, kinds = prompts.image_size, prompts.kinds()
            has_position = torch.ones(len(LABELS))
        else:
            size = prompts.input_image_size[0]
            embeddings = [prompts.not_a_point_embed, *prompts.point_embeddings]
            kinds = dict(zip(LABELS, (e.weight for e in embeddings), strict=True))
            has_position = torch.tensor(LABELS) != -1
        nothing = torch.zeros(1, 2 * gaussian.shape[1])
        self.scale = 2 / size
        self.kinds = constant(torch.cat([kinds.get(label, nothing) for label in LABELS]))
        self.has_position = constant(has_position[:, None])
        self.labels = constant(torch.tensor(LABELS))

    def forward(self, coords: Tensor, labels: Tensor) -> Tensor:
        """coords (B, N, 2), labels (B, N) → (B, N, 256)."""
        x, y = ((coords + 0.5) * self.scale - 1).split(1, dim=-1)
        # stays float32 in every precision, where TensorRT has no matrix product for Turing
        angles = x * self.across + y * self.down
        positions = torch.cat([angles.sin(), angles.cos()], dim=-1)
        is_kind = (labels[..., None] == self.labels).to(positions.dtype)
        return positions * (is_kind @ self.has_position) + is_kind @ self.kinds


class DensePrompts(nn.Module):
    """Mask logits → what is added to the image embedding, as tokens."""

    def __init__(self, prompts: reference.PromptTokens) -> None:
        super().__init__()
        conv1, norm1, act, conv2, norm2, _, conv3 = prompts.mask_downscaling
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            conv1,
            layer_norm(norm1),
            conv2,
            layer_norm(norm2),
        )
        self.act = act
        self.widen = linear(conv3.weight.flatten(1), conv3.bias)
        self.no_mask = constant(prompts.no_mask_embed.weight)

    def forward(self, mask_input: Tensor, has_mask_input: Tensor) -> Tensor:
        """mask_input (B, 1, 4g, 4g), has_mask_input (1,) → (B, g², 256)."""
        x = self.act(self.norm1(self.conv1(mask_input).permute(0, 2, 3, 1)))
        x = self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.widen(self.act(self.norm2(x))).flatten(1, 2)
        return torch.where(has_mask_input > 0.5, x, self.no_mask)


class CrossAttention(nn.Module):
    """SAM's attention between queries, keys and values that were projected before."""

    def __init__(self, attention: TwoWayAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, C), its softmax scale folded in; k, v (B, U, C) → (B, T, 256)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        a = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(a.transpose(1, 2).flatten(2))


class ImageProjection(nn.Module):
    """A projection of image tokens plus their positions: W(keys + pe) + b, W·pe + b constant."""

    def __init__(self, projection: nn.Linear, image_pe: Tensor) -> None:
        super().__init__()
        self.linear: nn.Linear = linear(projection.weight)
        weight, bias = projection.weight.double(), projection.bias.double()
        self.positions = constant(image_pe.double() @ weight.T + bias)

    def forward(self, keys: Tensor) -> Tensor:
        """(B, g², 256) → (B, g², C)."""
        return self.linear(keys) + self.positions


class SelfAttention(nn.Module):
    """Tokens attend to each other, in the form the checkpoint's keys show; norm1 is included."""

    def __init__(self, block: reference.TwoWayBlock) -> None:
        super().__init__()
        attention = block.self_attn
        self.form: TwoWay = block.form
        self.first = block.first
        self.query = scaled_query(attention)
        self.key = attention.k_proj
        self.value = attention.v_proj
        self.attention = CrossAttention(attention)
        self.norm = block.norm1

    def forward(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """(B, T, 256) → (B, T, 256)."""
        positioned = queries if self.first else queries + query_pe
        if self.form == "public":
            queries = positioned
        a = self.attention(self.query(positioned), self.key(positioned), self.value(queries))
        replaces = self.form == "meta" and self.first
        return self.norm(a if replaces else queries + a)


class FoldedHyperPromptAdapter(nn.Module):
    """HyP-Adpt with the hyper-weights of the fixed tokens as constants (folding 8)."""

    def __init__(self, adapter: HyperPromptAdapter, fixed: Tensor) -> None:
        super().__init__()
        self.lengths = adapter.lengths
        self.down, self.reduce, self.up = adapter.D_fc1, adapter.P_fc, adapter.D_fc2
        self.hyper, self.norms = adapter.hyper, adapter.norms
        reduced = adapter.P_fc(fixed)
        self.fixed = len(fixed)
        self.constants = nn.ParameterList(
            constant(hyper(reduced).unflatten(-1, pair))
            for hyper, pair in zip(adapter.hyper, self._pairs(), strict=True)
        )

    def _pairs(self) -> list[tuple[int, int]]:
        return list(pairwise(self.lengths))

    def forward(self, x: Tensor, query_pe: Tensor) -> Tensor:
        """x, query_pe (B, T, 256), the fixed tokens first → (B, T, 256)."""
        e = self.down(x)
        r = self.reduce(query_pe[:, self.fixed :])
        steps = zip(self.hyper, self.norms, self.constants, self._pairs(), strict=True)
        for hyper, norm, weights, pair in steps:
            fixed, prompted = e[:, : self.fixed, None], e[:, self.fixed :, None]
            e = torch.cat([fixed @ weights, prompted @ hyper(r).unflatten(-1, pair)], dim=1)
            e = F.relu(norm(e.squeeze(-2)))
        return x + self.up(e)


class AdaptedMLP(nn.Module):
    """The block's ReLU MLP, and its adapter beside it, whose GELU keeps the two apart."""

    def __init__(self, mlp: nn.Module, adapter: Adapter | None) -> None:
        super().__init__()
        self.mlp = mlp
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 256) → (B, T, 256)."""
        y = self.mlp(x)
        return y if self.adapter is None else y + 0.5 * self.adapter(x)


class TwoWayBlock(nn.Module):
    """One two-way block on tokens (B, T, 256) and image tokens (B, g², 256)."""

    def __init__(self, block: reference.TwoWayBlock, image_pe: Tensor, fixed: Tensor) -> None:
        super().__init__()
        to_image, to_tokens = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        self.self_attention = SelfAttention(block)
        self.image_query = scaled_query(to_image)
        self.image_key = ImageProjection(to_image.k_proj, image_pe)
        self.image_value = to_image.v_proj
        self.to_image = CrossAttention(to_image)
        self.hyper = (
            None
            if block.HyP_Adapter is None
            else FoldedHyperPromptAdapter(block.HyP_Adapter, fixed)
        )
        self.norm2 = block.norm2
        self.mlp = AdaptedMLP(block.mlp, block.MLP_Adapter)
        self.norm3 = block.norm3
        self.token_query = ImageProjection(scaled_query(to_tokens), image_pe)
        self.token_key = to_tokens.k_proj
        self.token_value = to_tokens.v_proj
        self.to_tokens = CrossAttention(to_tokens)
        self.image_adapter = block.Image_Adapter
        self.norm4 = block.norm4

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens and the image tokens after the block."""
        queries = self.self_attention(queries, query_pe)
        a = self.to_image(
            self.image_query(queries + query_pe), self.image_key(keys), self.image_value(keys)
        )
        if self.hyper is not None:
            a = self.hyper(a, query_pe)
        queries = self.norm2(queries + a)
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.to_tokens(
            self.token_query(keys), self.token_key(queries + query_pe), self.token_value(queries)
        )
        if self.image_adapter is not None:
            keys = keys + self.image_adapter(keys)
        return queries, self.norm4(keys)


class MaskWeights(nn.Module):
    """The hypernetwork MLPs of K masks as one batched MLP: tokens (B, K, 256) → (B, K, 32)."""

    def __init__(self, mlps: list[list[nn.Linear]], act: nn.Module) -> None:
        super().__init__()
        layers = list(zip(*mlps, strict=True))
        self.act = act
        self.weights = nn.ParameterList(
            constant(torch.stack([layer.weight.T for layer in step])) for step in layers
        )
        self.biases = nn.ParameterList(
            constant(torch.stack([layer.bias for layer in step])) for step in layers
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Each mask token through its own three layers."""
        x = tokens.unsqueeze(-2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias.unsqueeze(-2)
            if i < len(self.weights) - 1:
                x = self.act(x)
        return x.squeeze(-2)


class PredictsMasks(nn.Module):
    """What the decoder ends with, whole or in parts."""

    side: int
    masks: int
    mask_weights: MaskWeights
    upscaling: Upscaling
    iou: nn.Sequential

    def results(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The last tokens, iou and masks first, and image tokens → masks and predicted IoU."""
        weights = self.mask_weights(queries[:, 1 : 1 + self.masks])
        masks = weights @ self.upscaling(keys).transpose(1, 2)
        return self._pixels(masks), self.iou(queries[:, 0])

    def _pixels(self, masks: Tensor) -> Tensor:
        """(B, K, g² · 16), in the order (token, 2, 2, 2, 2) → (B, K, 4g, 4g)."""
        x = masks.unflatten(-1, (self.side, self.side, 2, 2, 2, 2))
        return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(
            -1, self.masks, 4 * self.side, 4 * self.side
        )


class Decoder(PredictsMasks):
    """Prompts and embeddings → K low-resolution masks and their predicted IoU."""

    def __init__(
        self,
        prompts: reference.PromptTokens | efficient_sam.PromptTokens,
        decoder: reference.Decoder | efficient_sam.Decoder,
        masks: int,
    ) -> None:
        super().__init__()
        transformer = decoder.transformer
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        image_pe = prompts.get_dense_pe()
        tokens_pe = image_pe[0].flatten(1).T
        last = transformer.final_attn_token_to_image
        self.side = image_pe.shape[-1]
        self.masks = masks
        self.sparse = SparsePrompts(prompts)
        self.dense = DensePrompts(prompts) if isinstance(decoder, reference.Decoder) else None
        self.fixed = constant(fixed)
        self.blocks = nn.ModuleList(TwoWayBlock(b, tokens_pe, fixed) for b in transformer.layers)
        self.last_query = scaled_query(last)
        self.last_key = ImageProjection(last.k_proj, tokens_pe)
        self.last_value = last.v_proj
        self.last = CrossAttention(last)
        self.norm = transformer.norm_final_attn
        self.upscaling = upscaling(decoder)
        act = nn.ReLU() if isinstance(decoder, reference.Decoder) else nn.GELU()
        heads = [_layers(mlp) for mlp in decoder.output_hypernetworks_mlps]
        self.mask_weights = MaskWeights(heads[:masks], act)
        self.iou = _first_outputs(_layers(decoder.iou_prediction_head), masks, act)

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor | None = None,
        has_mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(E, 256, g, g), (P, N, 2), (P, N), (P, 1, 4g, 4g), (1,) →
        low_res_masks (max(E, P), K, 4g, 4g), iou_predictions (max(E, P), K).

        EfficientSAM takes no mask prompt: neither `mask_input` nor `has_mask_input`.
        """
        masks_in = () if mask_input is None else (mask_input,)
        image, coords, labels, *mask = paired(
            image_embeddings, point_coords, point_labels, *masks_in
        )
        sparse = self.sparse(coords, labels)
        tokens = torch.cat([self.fixed.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        keys = image.flatten(2).transpose(1, 2)
        if self.dense is not None:
            keys = keys + self.dense(*mask, has_mask_input)

        queries = tokens
        for block in self.blocks:
            queries, keys = block(queries, keys, tokens)
        a = self.last(self.last_query(queries + tokens), self.last_key(keys), self.last_value(keys))
        return self.results(self.norm(queries + a), keys)


def paired(image: Tensor, coords: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """E embeddings and P prompt sets repeated to max(E, P) of each; one of E and P is 1, or E = P.

    Written with an index, since the exporter takes E and P for one number where they broadcast.
    """
    batch = torch.sym_max(image.shape[0], coords.shape[0])
    indices = torch.arange(batch)
    # An input of one row is read at row 0 every time; one of another length than max(E, P) is read
    # beyond its end, which the runtime refuses.
    return tuple(
        x.index_select(0, indices * torch.sym_min(x.shape[0] - 1, 1))
        for x in (image, coords, *others)
    )


def scaled_query(attention: TwoWayAttention) -> nn.Linear:
    """The query projection with the softmax scale folded in."""
    scale = (attention.internal_dim // attention.num_heads) ** -0.5
    return linear(scale * attention.q_proj.weight, scale * attention.q_proj.bias)


def _layers(mlp: nn.Module) -> list[nn.Linear]:
    """The linear layers of SAM's MLP, or of EfficientSAM's."""
    return [*(layer[0] for layer in mlp.layers), mlp.fc] if hasattr(mlp, "fc") else [*mlp.layers]


def _first_outputs(layers: list[nn.Linear], count: int, act: nn.Module) -> nn.Sequential:
    """The IoU head, its last layer cut to the masks that leave."""
    *hidden, last = layers
    steps = [step for layer in hidden for step in (layer, act)]
    return nn.Sequential(*steps, linear(last.weight[:count], last.bias[:count]))
