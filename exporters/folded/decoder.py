"""A decoder's layers → prompt encoder and mask decoder in one graph: embedding, prompts → masks.

Equal to the reference decoder. Folded: the dense positional encoding into each
image-side projection and the 0.5 and scaling of coordinates (folding 7); the hyper-weights of the
fixed tokens (folding 8); the hypernetwork MLPs of the masks that leave, as one batched MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsa_deploy.bundle.manifest import TwoWay
from medsa_deploy.exporters.reference import decoder as reference
from medsa_deploy.exporters.sam import TwoWayAttention

from .adapters import AdaptedMLP, FoldedHyperPromptAdapter, with_skips
from .linear import constant, layer_norm, linear
from .upscaling import Upscaling

LABELS = (-1, 0, 1, 2, 3)
"""Padding, background, foreground, first and second corner of a box."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderLayers:
    """The layers of a reference decoder, whatever its keys call them."""

    frequencies: Tensor
    """Of the positional encoding, (2, 128)."""
    image_size: int
    label_embeddings: Mapping[int, Tensor]
    """Label → the embedding of its points, (1, 256); a label without one adds nothing."""
    unplaced_labels: tuple[int, ...]
    """Labels of points that have no positional encoding."""
    image_pe: Tensor
    """Positional encoding of the embedding's grid, (1, 256, g, g)."""
    mask_prompts: DensePrompts | None
    """None for a decoder without mask prompts."""
    output_tokens: Tensor
    """The IoU token and the mask tokens, (1 + M, 256)."""
    transformer: reference.TwoWayTransformer
    upscaling: Upscaling
    mask_mlps: Sequence[Sequence[nn.Linear]]
    """The hypernetwork of each mask token."""
    iou_mlp: Sequence[nn.Linear]
    act: nn.Module
    """The activation in both."""


class SparsePrompts(nn.Module):
    """Points and labels → prompt tokens."""

    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__()
        self.across, self.down = map(constant, 2 * math.pi * layers.frequencies)
        zeros = torch.zeros(1, 2 * layers.frequencies.shape[1])
        embeddings = [layers.label_embeddings.get(label, zeros) for label in LABELS]
        placed = torch.tensor([label not in layers.unplaced_labels for label in LABELS])
        self.scale = 2 / layers.image_size
        self.kinds = constant(torch.cat(embeddings))
        self.has_position = constant(placed[:, None])
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
        self.token_adapters = with_skips(block.Adapter)
        self.norm2 = block.norm2
        self.mlp = AdaptedMLP(block.mlp, block.MLP_Adapter)
        self.norm3 = block.norm3
        self.token_query = ImageProjection(scaled_query(to_tokens), image_pe)
        self.token_key = to_tokens.k_proj
        self.token_value = to_tokens.v_proj
        self.to_tokens = CrossAttention(to_tokens)
        self.image_adapters = with_skips(block.Image_Adapter, block.Adapter)
        self.norm4 = block.norm4

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens and the image tokens after the block."""
        queries = self.self_attention(queries, query_pe)
        a = self.to_image(
            self.image_query(queries + query_pe), self.image_key(keys), self.image_value(keys)
        )
        if self.hyper is not None:
            a = self.hyper(a, query_pe)
        queries = self.norm2(self.token_adapters(queries + a))
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.to_tokens(
            self.token_query(keys), self.token_key(queries + query_pe), self.token_value(queries)
        )
        return queries, self.norm4(self.image_adapters(keys))


class MaskWeights(nn.Module):
    """The hypernetwork MLPs of K masks as one batched MLP: tokens (B, K, 256) → (B, K, 32)."""

    def __init__(self, mlps: Sequence[Sequence[nn.Linear]], act: nn.Module) -> None:
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
    """The end of the decoder, whole or in parts."""

    side: int
    leaving: range
    """The mask tokens whose masks leave."""
    mask_weights: MaskWeights
    upscaling: Upscaling
    iou: nn.Sequential

    def results(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The last tokens, iou and masks first, and image tokens → masks and predicted IoU."""
        weights = self.mask_weights(queries[:, 1 + self.leaving.start : 1 + self.leaving.stop])
        masks = weights @ self.upscaling(keys).transpose(1, 2)
        return self._pixels(masks), self.iou(queries[:, 0])

    def _pixels(self, masks: Tensor) -> Tensor:
        """(B, K, g² · 16), in the order (token, 2, 2, 2, 2) → (B, K, 4g, 4g)."""
        x = masks.unflatten(-1, (self.side, self.side, 2, 2, 2, 2))
        return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(
            -1, len(self.leaving), 4 * self.side, 4 * self.side
        )


class Decoder(PredictsMasks):
    """Prompts and embeddings → K low-resolution masks and their predicted IoU."""

    def __init__(self, layers: DecoderLayers, leaving: range) -> None:
        super().__init__()
        transformer, fixed = layers.transformer, layers.output_tokens
        image_pe = layers.image_pe[0].flatten(1).T
        last = transformer.final_attn_token_to_image
        self.side = layers.image_pe.shape[-1]
        self.leaving = leaving
        self.sparse = SparsePrompts(layers)
        self.dense = layers.mask_prompts
        self.fixed = constant(fixed)
        self.blocks = nn.ModuleList(TwoWayBlock(b, image_pe, fixed) for b in transformer.layers)
        self.last_query = scaled_query(last)
        self.last_key = ImageProjection(last.k_proj, image_pe)
        self.last_value = last.v_proj
        self.last = CrossAttention(last)
        self.norm = transformer.norm_final_attn
        self.upscaling = layers.upscaling
        self.mask_weights = MaskWeights([layers.mask_mlps[i] for i in leaving], layers.act)
        self.iou = _some_outputs(layers.iou_mlp, leaving, layers.act)

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

        A decoder without mask prompts takes neither `mask_input` nor `has_mask_input`.
        """
        mask_inputs = () if mask_input is None else (mask_input,)
        image, coords, labels, *mask = paired(
            image_embeddings, point_coords, point_labels, *mask_inputs
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


def paired(image: Tensor, coords: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """E embeddings and P prompt sets repeated to max(E, P) of each; one of E and P is 1, or E = P.

    Written with an index, since the exporter takes E and P for one number where they broadcast.
    """
    batch = torch.sym_max(image.shape[0], coords.shape[0])
    indices = torch.arange(batch)
    # An input of one row is read at row 0 every time; one of another length than max(E, P) is read
    # beyond its end, which the runtime refuses.
    return tuple(
        x.index_select(0, indices * torch.sym_min(x.shape[0] - 1, 1))
        for x in (image, coords, *inputs)
    )


def scaled_query(attention: TwoWayAttention) -> nn.Linear:
    """The query projection with the softmax scale folded in."""
    scale = (attention.internal_dim // attention.num_heads) ** -0.5
    return linear(scale * attention.q_proj.weight, scale * attention.q_proj.bias)


def _some_outputs(layers: Sequence[nn.Linear], rows: range, act: nn.Module) -> nn.Sequential:
    """The IoU head, its last layer cut to the masks that leave."""
    *hidden, last = layers
    steps = [step for layer in hidden for step in (layer, act)]
    part = slice(rows.start, rows.stop)
    return nn.Sequential(*steps, linear(last.weight[part], last.bias[part]))
