"""A checkpoint's network, whole, for inference: what every exported graph is compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network


class ReferenceNetwork(nn.Module):
    """Encoder, prompt encoder and decoder; the names of its state dict are the checkpoint's.

    `encoder_key`: what the encoder's keys begin with. `prompt_encoder` has the methods `sparse`,
    `dense` and `get_dense_pe` of `decoder.PromptTokens`. `leaving`: the mask tokens whose masks
    leave.
    """

    def __init__(
        self,
        network: Network,
        *,
        encoder: nn.Module,
        encoder_key: str,
        prompt_encoder: Any,
        mask_decoder: nn.Module,
        leaving: range,
    ) -> None:
        super().__init__()
        self.network = network
        self.leaving = leaving
        self.encoder_key = encoder_key
        self.add_module(encoder_key, encoder)
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder = mask_decoder

    @property
    def encoder(self) -> nn.Module:
        """The image encoder."""
        return self.get_submodule(self.encoder_key)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        return self.encoder(image)

    def decode(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (E, 256, g, g), point_coords (P, N, 2), point_labels (P, N) and mask logits
        (P, 1, 4g, 4g) or None → low_res_masks (max(E, P), K, 4g, 4g), iou_predictions (…, K)."""
        prompts = self.prompt_encoder
        masks, iou = self.mask_decoder(
            image_embeddings,
            prompts.get_dense_pe(),
            prompts.sparse(point_coords, point_labels),
            prompts.dense(mask_input),
        )
        tokens = slice(self.leaving.start, self.leaving.stop)
        return masks[:, tokens], iou[:, tokens]
