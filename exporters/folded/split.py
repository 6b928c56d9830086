"""The folded decoder in two parts: what depends on the image alone, and what a click adds (§6.9).

The image part gives what the first two-way block makes of the image tokens; the click part takes
that and the prompts, and is the same function as the whole. A mask prompt would change the image
tokens, so it takes none. Where an attention projects the g² image tokens, it takes the projection
to the few tokens on the other side: (W(keys + pe) + b)·x = keys·(Wᵀx) + (W·pe + b)·x. T tokens of
8 heads are fewer columns than a projection has, and nothing of g² rows is cut into heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decoder import Decoder, ImageProjection, PredictsMasks, TwoWayBlock, paired
from .linear import constant


def in_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) → (B, heads, T, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class ImagePart(nn.Module):
    """An embedding → its image tokens and the first block's projections of them."""

    heads: int
    key: ImageProjection
    value: nn.Linear
    query: ImageProjection

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        first = decoder.blocks[0]
        self.heads = first.to_image.heads
        self.key, self.value, self.query = first.image_key, first.image_value, first.token_query
        self.no_mask = None if decoder.dense is None else decoder.dense.no_mask

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(E, 256, g, g) → image_tokens (E, g², 256), image_key (E, heads, C, g²), image_value
        (E, heads, g², C), image_query (E, heads, C, g²), which the tokens' keys are scored with."""
        tokens = image_embeddings.flatten(2).transpose(1, 2)
        if self.no_mask is not None:
            tokens = tokens + self.no_mask
        key, value, query = (
            in_heads(project(tokens), self.heads) for project in (self.key, self.value, self.query)
        )
        return tokens, key.transpose(2, 3), value, query.transpose(2, 3)


class Scores(nn.Module):
    """Products of projected image tokens with tokens, the projection taken to the tokens."""

    def __init__(self, projection: ImageProjection, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = constant(projection.linear.weight.unflatten(0, (heads, -1)))
        self.positions = constant(projection.positions.T.unflatten(0, (heads, -1)))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """x (B, heads, T, C), keys (B, g², 256) → (B, heads, T, g²)."""
        products = (x @ self.weight).flatten(1, 2) @ keys.transpose(1, 2)
        return products.unflatten(1, (self.heads, -1)) + x @ self.positions


class TokenToImage(nn.Module):
    """Tokens attend to image tokens; what they see is projected after the sum, not before."""

    def __init__(self, key: ImageProjection, value: nn.Linear, heads: int) -> None:
        super().__init__()
        self.scores = Scores(key, heads)
        self.weight = constant(value.weight.unflatten(0, (heads, -1)).transpose(1, 2))
        self.bias = constant(value.bias.unflatten(0, (heads, 1, -1)))

    def forward(self, q: Tensor, keys: Tensor) -> Tensor:
        """q (B, heads, T, C), its scale folded in, keys (B, g², 256) → (B, heads, T, C)."""
        seen = self.scores(q, keys).softmax(-1).flatten(1, 2) @ keys
        return seen.unflatten(1, (q.shape[1], -1)) @ self.weight + self.bias


class ImageToToken(nn.Module):
    """Image tokens take the tokens' values, projected already, by their scores."""

    def __init__(self, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weight = constant(out.weight.T.unflatten(0, (heads, -1)))
        self.bias = constant(out.bias / heads)  # a head's shares sum to 1

    def forward(self, scores: Tensor, values: Tensor) -> Tensor:
        """scores (B, heads, T, g²), values (B, heads, T, C) → (B, g², 256)."""
        shares = scores.softmax(2).flatten(1, 2).transpose(1, 2)
        return shares @ (values @ self.weight + self.bias).flatten(1, 2)


class ClickBlock(nn.Module):
    """A two-way block that projects tokens only; the first takes the image part's projections."""

    def __init__(self, block: TwoWayBlock, *, first: bool) -> None:
        super().__init__()
        self.heads = heads = block.to_image.heads
        self.self_attention = block.self_attention
        self.image_query, self.image_out = block.image_query, block.to_image.out
        self.to_image = None if first else TokenToImage(block.image_key, block.image_value, heads)
        self.hyper = block.hyper
        self.token_adapters = block.token_adapters
        self.norm2, self.mlp, self.norm3 = block.norm2, block.mlp, block.norm3
        self.token_key, self.token_value = block.token_key, block.token_value
        self.scores = None if first else Scores(block.token_query, heads)
        self.to_tokens = ImageToToken(block.to_tokens.out, heads)
        self.image_adapters, self.norm4 = block.image_adapters, block.norm4

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, projected: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The tokens and the image tokens after the block."""
        image_key, image_value, image_query = projected
        queries = self.self_attention(queries, query_pe)
        q = in_heads(self.image_query(queries + query_pe), self.heads)
        a = (
            (q @ image_key).softmax(-1) @ image_value
            if self.to_image is None
            else self.to_image(q, keys)
        )
        a = self.image_out(a.transpose(1, 2).flatten(2))
        if self.hyper is not None:
            a = self.hyper(a, query_pe)
        queries = self.norm2(self.token_adapters(queries + a))
        queries = self.norm3(queries + self.mlp(queries))
        k = in_heads(self.token_key(queries + query_pe), self.heads)
        v = in_heads(self.token_value(queries), self.heads)
        scores = k @ image_query if self.scores is None else self.scores(k, keys)
        keys = keys + self.to_tokens(scores, v)
        return queries, self.norm4(self.image_adapters(keys))


class ClickPart(PredictsMasks):
    """The image part's outputs and prompts → K low-resolution masks and their predicted IoU."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.side, self.leaving, self.heads = decoder.side, decoder.leaving, decoder.last.heads
        self.sparse, self.fixed = decoder.sparse, decoder.fixed
        self.blocks = nn.ModuleList(
            ClickBlock(block, first=i == 0) for i, block in enumerate(decoder.blocks)
        )
        self.last_query, self.last_out = decoder.last_query, decoder.last.out
        self.last = TokenToImage(decoder.last_key, decoder.last_value, self.heads)
        self.norm, self.upscaling = decoder.norm, decoder.upscaling
        self.mask_weights, self.iou = decoder.mask_weights, decoder.iou

    def forward(
        self,
        image_tokens: Tensor,
        image_key: Tensor,
        image_value: Tensor,
        image_query: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`ImagePart`'s outputs of E embeddings, (P, N, 2), (P, N) →
        low_res_masks (max(E, P), K, 4g, 4g), iou_predictions (max(E, P), K)."""
        keys, coords, labels, *projected = paired(
            image_tokens, point_coords, point_labels, image_key, image_value, image_query
        )
        sparse = self.sparse(coords, labels)
        tokens = torch.cat([self.fixed.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        queries = tokens
        for block in self.blocks:
            queries, keys = block(queries, keys, tokens, tuple(projected))
        read = slice(1 + self.leaving.stop)  # the iou token and those of the masks that leave
        queries, tokens = queries[:, read], tokens[:, read]
        a = self.last(in_heads(self.last_query(queries + tokens), self.heads), keys)
        queries = self.norm(queries + self.last_out(a.transpose(1, 2).flatten(2)))
        return self.results(queries, keys)
