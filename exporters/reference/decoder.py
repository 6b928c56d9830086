"""SAM's prompt encoder and mask decoder, with adapters, as a checkpoint carries them.

The two-way block comes in two forms, told apart by the names of its MLP's keys: Meta's, and the
public Med-SA code's. Each may carry the decoder adapters of section 3.4 of the paper, or those of
finetune-SAM: `Adapter`, on the tokens and on the image tokens, and `MLP_Adapter`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network, TwoWay
from medsa_deploy.exporters.adapters import adapter
from medsa_deploy.exporters.hyper_prompt_adapter import hyper_prompt_adapter
from medsa_deploy.exporters.sam import MaskDecoder, MLPBlock, PromptEncoder, TwoWayAttention
from medsa_deploy.exporters.shapes import Shapes

HEADS = 8
"""Attention heads of SAM's two-way transformer; no shape shows them and no known file differs."""


class PromptTokens(PromptEncoder):
    """SAM's prompt encoder, its boxes given as points with labels 2 and 3."""

    def __init__(self, shapes: Shapes, *, image_size: int, embedding_size: int) -> None:
        prefix = "prompt_encoder"
        super().__init__(
            embed_dim=shapes[f"{prefix}.no_mask_embed.weight"][1],
            image_embedding_size=(embedding_size, embedding_size),
            input_image_size=(image_size, image_size),
            mask_in_chans=shapes[f"{prefix}.mask_downscaling.3.weight"][0],
        )

    def sparse(self, coords: Tensor, labels: Tensor) -> Tensor:
        """coords (P, N, 2) in network pixels, labels (P, N) in −1, 0, 1, 2, 3 → (P, N, 256)."""
        encoded = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        encoded = torch.where(labels[..., None] == -1, 0.0, encoded)
        kinds = {-1: self.not_a_point_embed, **dict(enumerate(self.point_embeddings))}
        for label, embedding in kinds.items():
            encoded = torch.where(labels[..., None] == label, encoded + embedding.weight, encoded)
        return encoded

    def dense(self, mask_input: Tensor | None) -> Tensor:
        """Mask logits (P, 1, 4g, 4g), or None, → (P or 1, 256, g, g)."""
        if mask_input is not None:
            return self.mask_downscaling(mask_input)
        return self.no_mask_embed.weight[:, :, None, None].expand(
            -1, -1, *self.image_embedding_size
        )


class PublicMLP(nn.Module):
    """The MLP of the public Med-SA code's two-way block: keys `layers.0.0` and `fc`."""

    def __init__(self, width: int, hidden: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.act = act()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, hidden))])
        self.fc = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.fc(self.act(self.layers[0](x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, to the image, pass an MLP; then the image attends to them."""

    def __init__(
        self, shapes: Shapes, index: int, *, form: TwoWay, act: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        prefix = f"mask_decoder.transformer.layers.{index}"
        mlp_key = "mlp.lin1.weight" if form == "meta" else "mlp.layers.0.0.weight"
        hidden, width = shapes[f"{prefix}.{mlp_key}"]
        self.form = form
        self.first = index == 0
        self.self_attn = two_way_attention(shapes, f"{prefix}.self_attn")
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = two_way_attention(
            shapes, f"{prefix}.cross_attn_token_to_image"
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = (
            MLPBlock(width, hidden, act=act) if form == "meta" else PublicMLP(width, hidden, act)
        )
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = two_way_attention(
            shapes, f"{prefix}.cross_attn_image_to_token"
        )
        self.norm4 = nn.LayerNorm(width)
        self.HyP_Adapter = hyper_prompt_adapter(shapes, f"{prefix}.HyP_Adapter")
        self.MLP_Adapter = adapter(shapes, f"{prefix}.MLP_Adapter", skip=False)
        self.Image_Adapter = adapter(shapes, f"{prefix}.Image_Adapter", skip=False)
        finetuned = form == "meta" and self.HyP_Adapter is None and self.Image_Adapter is None
        self.Adapter = adapter(shapes, f"{prefix}.Adapter", skip=True) if finetuned else None

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries, query_pe: (B, T, 256); keys, key_pe: (B, g², 256)."""
        queries = self.norm1(self._self_attention(queries, query_pe))

        a = self.cross_attn_token_to_image(q=queries + query_pe, k=keys + key_pe, v=keys)
        if self.HyP_Adapter is not None:
            a = self.HyP_Adapter(a, query_pe)
        queries = queries + a
        if self.Adapter is not None:
            queries = self.Adapter(queries)
        queries = self.norm2(queries)

        m = self.mlp(queries)
        if self.MLP_Adapter is not None:
            m = m + 0.5 * self.MLP_Adapter(queries)
        queries = self.norm3(queries + m)

        keys = keys + self.cross_attn_image_to_token(
            q=keys + key_pe, k=queries + query_pe, v=queries
        )
        if self.Image_Adapter is not None:
            keys = keys + self.Image_Adapter(keys)
        if self.Adapter is not None:
            keys = self.Adapter(keys)
        return queries, self.norm4(keys)

    def _self_attention(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        if self.form == "public":
            if not self.first:
                queries = queries + query_pe
            return queries + self.self_attn(q=queries, k=queries, v=queries)
        if self.first:
            return self.self_attn(q=queries, k=queries, v=queries)
        q = queries + query_pe
        return queries + self.self_attn(q=q, k=q, v=queries)


class TwoWayTransformer(nn.Module):
    """The two-way blocks and the last attention from tokens to the image."""

    def __init__(self, shapes: Shapes, *, form: TwoWay, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        prefix = "mask_decoder.transformer"
        self.layers = nn.ModuleList(
            TwoWayBlock(shapes, i, form=form, act=act)
            for i in range(shapes.count(f"{prefix}.layers"))
        )
        self.final_attn_token_to_image = two_way_attention(
            shapes, f"{prefix}.final_attn_token_to_image"
        )
        self.norm_final_attn = nn.LayerNorm(shapes[f"{prefix}.norm_final_attn.weight"][0])

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image, image_pe: (B, g², 256); tokens: (B, T, 256)."""
        queries, keys = tokens, image
        for layer in self.layers:
            queries, keys = layer(queries, keys, query_pe=tokens, key_pe=image_pe)
        a = self.final_attn_token_to_image(q=queries + tokens, k=keys + image_pe, v=keys)
        return self.norm_final_attn(queries + a), keys


class Decoder(MaskDecoder):
    """SAM's mask decoder on any pairing of E embeddings and P prompt sets."""

    def __init__(self, shapes: Shapes, *, form: TwoWay) -> None:
        prefix = "mask_decoder"
        mask_tokens, width = shapes[f"{prefix}.mask_tokens.weight"]
        super().__init__(
            transformer_dim=width,
            transformer=TwoWayTransformer(shapes, form=form),
            num_multimask_outputs=mask_tokens - 1,
            iou_head_depth=shapes.count(f"{prefix}.iou_prediction_head.layers"),
            iou_head_hidden_dim=shapes[f"{prefix}.iou_prediction_head.layers.0.weight"][0],
        )

    def forward(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image_embeddings (E, 256, g, g), sparse (P, N, 256), dense (P or 1, 256, g, g) →
        low-resolution logits (max(E, P), M, 4g, 4g) and IoU predictions (max(E, P), M) of all M
        mask tokens."""
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        image, tokens = paired(image_embeddings + dense, outputs, sparse)
        b, c, h, w = image.shape

        hs, keys = self.transformer(
            image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2), tokens
        )

        upscaled = self.output_upscaling(keys.transpose(1, 2).reshape(b, c, h, w))
        hyper = torch.stack(
            [mlp(hs[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        return masks, self.iou_prediction_head(hs[:, 0])


def prompts_and_decoder(network: Network, shapes: Shapes) -> tuple[PromptTokens, Decoder]:
    """The two modules of a network, without weights."""
    prompts = PromptTokens(
        shapes, image_size=network.image_size, embedding_size=network.embedding_size
    )
    return prompts, Decoder(shapes, form=network.two_way)


def paired(image: Tensor, outputs: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """E embeddings and P prompt sets, output tokens first, both repeated to max(E, P)."""
    tokens = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
    batch = max(len(image), len(tokens))
    return image.expand(batch, -1, -1, -1), tokens.expand(batch, -1, -1)


def two_way_attention(shapes: Shapes, prefix: str) -> TwoWayAttention:
    """SAM's attention of the two-way transformer, sized by the checkpoint."""
    inner, width = shapes[f"{prefix}.q_proj.weight"]
    return TwoWayAttention(width, HEADS, downsample_rate=width // inner)
