"""SAM and what other code makes of it, as plain equations on a checkpoint's own keys, in float64.

A second computation, to compare the networks with: nothing is merged, nothing is shared with the
package. Low-rank updates are two products beside their linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}


def in_windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) → (B·windows, side, side, C), zeros beyond the edge."""
    _, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side))
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)


def out_of_windows(x: Tensor, shape: Sequence[int]) -> Tensor:
    b, h, w, c = shape
    side = x.shape[1]
    rows, columns = -(-h // side), -(-w // side)
    x = x.reshape(b, rows, columns, side, side, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * side, columns * side, c)[:, :h, :w]


@dataclass
class DirectSAM:
    """A SAM ViT with the adapters and updates that its keys show."""

    tensors: Mapping[str, Tensor]
    heads: int = 1
    window: int = 0
    global_blocks: Sequence[int] = ()
    windows_first: bool = False
    eps: float = 1e-6
    positions: str = "bicubic"

    def __post_init__(self) -> None:
        self.t = {
            k.replace(".rel_h", ".rel_pos_h").replace(".rel_w", ".rel_pos_w"): v.double()
            for k, v in self.tensors.items()
        }

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.t[f"{name}.weight"].T
        return y + self.t[f"{name}.bias"] if f"{name}.bias" in self.t else y

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def adapter(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.D_fc1")), f"{name}.D_fc2")

    def product(self, x: Tensor, a: str, b: str) -> Tensor | float:
        return x @ self.t[a].T @ self.t[b].T if a in self.t else 0.0

    def qkv(self, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        name = f"image_encoder.blocks.{i}.attn.qkv"
        wrapped = f"{name}.qkv.weight" in self.t
        q, k, v = self.linear(x, f"{name}.qkv" if wrapped else name).chunk(3, -1)
        for row, place in (("q", 2 * i), ("v", 2 * i + 1)):
            update = self.product(
                x, f"{name}.linear_a_{row}.weight", f"{name}.linear_b_{row}.weight"
            ) + self.product(x, f"w_a_{place:03d}", f"w_b_{place:03d}")
            q, v = (q + update, v) if row == "q" else (q, v + update)
        return q, k, v

    def table(self, name: str, side: int) -> Tensor:
        table = self.t[name]
        if len(table) != 2 * side - 1:
            table = F.interpolate(table.T[None], 2 * side - 1, mode="linear")[0].T
        place = torch.arange(side)
        return table[place[:, None] - place + side - 1]

    def attention(self, n: Tensor, i: int) -> Tensor:
        """(M, h, w, C) → (M, h, w, C)."""
        m, side, _, c = n.shape
        name = f"image_encoder.blocks.{i}.attn"
        q, k, v = (
            y.reshape(m, side * side, self.heads, -1).transpose(1, 2)
            for y in self.qkv(n.flatten(1, 2), i)
        )
        scores = q @ k.mT / math.sqrt(c // self.heads)
        if f"{name}.rel_pos_h" in self.t:
            rows, columns = (
                self.table(f"{name}.rel_pos_h", side),
                self.table(f"{name}.rel_pos_w", side),
            )
            token = torch.arange(side * side)
            row, column = token // side, token % side
            bias = rows[row][:, row] + columns[column][:, column]
            scores = scores + torch.einsum("mhic,ijc->mhij", q, bias)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n.shape)
        y = self.linear(y, f"{name}.proj")
        space = f"image_encoder.blocks.{i}.Space_Adapter"
        return y + self.adapter(y, space) if f"{space}.D_fc1.weight" in self.t else y

    def block(self, x: Tensor, i: int) -> Tensor:
        name = f"image_encoder.blocks.{i}"
        side = 0 if i in self.global_blocks else self.window
        if self.windows_first and side:
            y = self.attention(self.norm(in_windows(x, side), f"{name}.norm1", self.eps), i)
        elif side:
            y = self.attention(in_windows(self.norm(x, f"{name}.norm1", self.eps), side), i)
        else:
            y = self.attention(self.norm(x, f"{name}.norm1", self.eps), i)
        x = x + (out_of_windows(y, x.shape) if side else y)
        n = self.norm(x, f"{name}.norm2", self.eps)
        first, second = ("lin1", "lin2") if f"{name}.mlp.lin1.weight" in self.t else ("fc1", "fc2")
        x = x + self.linear(F.gelu(self.linear(n, f"{name}.mlp.{first}")), f"{name}.mlp.{second}")
        if f"{name}.MLP_Adapter.D_fc1.weight" in self.t:
            x = x + 0.5 * self.adapter(n, f"{name}.MLP_Adapter")
        if f"{name}.Adapter.norm.weight" in self.t:
            x = x + self.channel_space(n, f"{name}.Adapter")
        return x

    def channel_space(self, n: Tensor, name: str) -> Tensor:
        """SAM-Med2D's adapter."""
        gate = n.mean((1, 2)) @ self.t[f"{name}.channel.0.weight"].T
        gate = (gate.relu() @ self.t[f"{name}.channel.2.weight"].T).sigmoid()
        y = (n * gate[:, None, None]).permute(0, 3, 1, 2)
        y = F.conv2d(y, self.t[f"{name}.spatial.0.weight"], stride=2, padding=1).relu()
        y = F.conv_transpose2d(y, self.t[f"{name}.spatial.2.weight"], stride=2, padding=1).relu()
        return self.norm(n + y.permute(0, 2, 3, 1), f"{name}.norm")

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, g, g)."""
        t = self.t
        patch = "image_encoder.patch_embed.proj"
        x = F.conv2d(image.double(), t[f"{patch}.weight"], t[f"{patch}.bias"], stride=16)
        grid = x.shape[-1]
        table = t["image_encoder.pos_embed"]
        if table.ndim == 3:
            table = table[:, 1:].reshape(1, 14, 14, -1)
        table = table.permute(0, 3, 1, 2)
        if table.shape[-1] != grid:
            table = F.interpolate(table, (grid, grid), mode=self.positions)
        x = (x + table).permute(0, 2, 3, 1)
        for i in range(len({k.split(".")[2] for k in t if k.startswith("image_encoder.blocks.")})):
            x = self.block(x, i)
        neck = "image_encoder.neck"
        x = self.norm(x @ t[f"{neck}.0.weight"].flatten(1).T, f"{neck}.1", 1e-6)
        x = F.conv2d(x.permute(0, 3, 1, 2), t[f"{neck}.2.weight"], padding=1)
        return self.norm(x.permute(0, 2, 3, 1), f"{neck}.3", 1e-6).permute(0, 3, 1, 2)

    # The decoder, in Meta's form

    def projection(self, x: Tensor, attention: str, letter: str) -> Tensor:
        name = f"mask_decoder.transformer.{attention}.{letter}_proj"
        if f"{name}.w_a.weight" in self.t:
            update = self.product(x, f"{name}.w_a.weight", f"{name}.w_b.weight")
            return self.linear(x, f"{name}.proj") + update
        y = self.linear(x, name)
        if letter not in "qv":
            return y
        if attention == "final_attn_token_to_image":
            return y + self.product(x, f"fati_{letter}a", f"fati_{letter}b")
        _, layer, kind = attention.split(".")
        for short, long in NAMES.items():
            if kind == long:
                number = 2 * int(layer) + "qv".index(letter)
                y = y + self.product(x, f"{short}_a_{number:03d}", f"{short}_b_{number:03d}")
        return y

    def attend(self, attention: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            self.projection(x, attention, letter).unflatten(-1, (8, -1)).transpose(1, 2)
            for letter, x in zip("qkv", (q, k, v), strict=True)
        )
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        name = f"mask_decoder.transformer.{attention}.out_proj"
        return self.linear(y.transpose(1, 2).flatten(2), name)

    def encoded(self, coords: Tensor) -> Tensor:
        """Coordinates in 0…1 (…, 2) → (…, 256)."""
        matrix = self.t["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        angles = 2 * math.pi * ((2 * coords - 1) @ matrix)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def prompts(self, coords: Tensor, labels: Tensor, size: int) -> Tensor:
        """(N, 2), (N,) → (N, 256): label −1 has no position."""
        points = [f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]
        tokens = [
            self.t["prompt_encoder.not_a_point_embed.weight"][0]
            if label == -1
            else self.encoded((point + 0.5) / size) + self.t[points[int(label)]][0]
            for point, label in zip(coords.double(), labels, strict=True)
        ]
        return torch.stack(tokens) if tokens else torch.zeros(0, 256, dtype=torch.float64)

    def adapted(self, x: Tensor, name: str) -> Tensor:
        return x + self.adapter(x, name) if f"{name}.D_fc1.weight" in self.t else x

    def decode(self, embedding: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 256, g, g), (N, 2), (N,) → the masks (M, 4g, 4g) and IoU (M,) of all tokens."""
        t, grid = self.t, embedding.shape[-1]
        centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        key_pe = self.encoded(torch.stack([x, y], -1)).reshape(1, grid * grid, 256)
        dense = t["prompt_encoder.no_mask_embed.weight"]
        keys = embedding.double().flatten(2).mT + dense
        outputs = [t["mask_decoder.iou_token.weight"], t["mask_decoder.mask_tokens.weight"]]
        query_pe = torch.cat([*outputs, self.prompts(coords, labels, 16 * grid)])[None]
        queries = query_pe
        for i in range(2):
            layer = f"layers.{i}"
            name = f"mask_decoder.transformer.{layer}"
            q = queries if i == 0 else queries + query_pe
            a = self.attend(f"{layer}.self_attn", q, q, queries)
            queries = self.norm(a if i == 0 else queries + a, f"{name}.norm1")
            queries = queries + self.attend(
                f"{layer}.cross_attn_token_to_image", queries + query_pe, keys + key_pe, keys
            )
            queries = self.norm(self.adapted(queries, f"{name}.Adapter"), f"{name}.norm2")
            m = self.linear(self.linear(queries, f"{name}.mlp.lin1").relu(), f"{name}.mlp.lin2")
            if f"{name}.MLP_Adapter.D_fc1.weight" in t:
                m = m + 0.5 * self.adapter(queries, f"{name}.MLP_Adapter")
            queries = self.norm(queries + m, f"{name}.norm3")
            keys = keys + self.attend(
                f"{layer}.cross_attn_image_to_token", keys + key_pe, queries + query_pe, queries
            )
            keys = self.norm(self.adapted(keys, f"{name}.Adapter"), f"{name}.norm4")
        queries = queries + self.attend(
            "final_attn_token_to_image", queries + query_pe, keys + key_pe, keys
        )
        queries = self.norm(queries, "mask_decoder.transformer.norm_final_attn")
        return self.results(queries, keys.mT.unflatten(2, (grid, grid)))

    def results(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        t, name = self.t, "mask_decoder.output_upscaling"
        x = F.conv_transpose2d(keys, t[f"{name}.0.weight"], t[f"{name}.0.bias"], stride=2)
        x = self.norm(x.permute(0, 2, 3, 1), f"{name}.1", 1e-6).permute(0, 3, 1, 2)
        x = F.conv_transpose2d(F.gelu(x), t[f"{name}.3.weight"], t[f"{name}.3.bias"], stride=2)
        pixels = F.gelu(x)[0]
        count = len(t["mask_decoder.mask_tokens.weight"])

        def mlp(token: Tensor, prefix: str) -> Tensor:
            for i in range(3):
                token = self.linear(token, f"{prefix}.layers.{i}")
                token = token.relu() if i < 2 else token
            return token

        weights = [
            mlp(queries[0, 1 + i], f"mask_decoder.output_hypernetworks_mlps.{i}")
            for i in range(count)
        ]
        masks = torch.einsum("mc,chw->mhw", torch.stack(weights), pixels)
        return masks, mlp(queries[0, 0], "mask_decoder.iou_prediction_head")
