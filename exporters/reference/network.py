"""A checkpoint's network, whole: what every exported graph is proved against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medsa_deploy.bundle.manifest import Network
from medsa_deploy.exporters.sd_trans import SDTrans
from medsa_deploy.exporters.shapes import Shapes

from . import efficient_sam, tiny_vit, vit
from .decoder import Decoder, PromptTokens


class ReferenceNetwork(nn.Module):
    """Encoder, prompt encoder and decoder; the names of its state dict are the checkpoint's."""

    def __init__(self, network: Network, shapes: Shapes) -> None:
        super().__init__()
        self.network = network
        self.image_encoder = (
            tiny_vit.ImageEncoder(shapes)
            if network.encoder == "tiny_vit"
            else vit.ImageEncoder(
                shapes,
                heads=network.heads[0],
                window=network.windows[0],
                global_blocks=network.global_blocks,
                sd_trans=SDTrans.of(network),
            )
        )
        sizes = {"image_size": network.image_size, "embedding_size": network.embedding_size}
        if network.family == "efficient_sam":
            self.prompt_encoder = efficient_sam.PromptTokens(shapes, **sizes)
            self.mask_decoder = efficient_sam.Decoder(shapes)
        else:
            self.prompt_encoder = PromptTokens(shapes, **sizes)
            self.mask_decoder = Decoder(shapes, form=network.two_way)

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        return self.image_encoder(image)

    def decode(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (E, 256, g, g), point_coords (P, N, 2), point_labels (P, N) and mask logits
        (P, 1, 4g, 4g) or None → low_res_masks (max(E, P), K, 4g, 4g), iou_predictions (…, K).

        EfficientSAM takes no mask prompt.
        """
        prompts = self.prompt_encoder
        dense = [prompts.dense(mask_input)] if isinstance(prompts, PromptTokens) else []
        sparse = prompts.sparse(point_coords, point_labels)
        masks, iou = self.mask_decoder(image_embeddings, prompts.get_dense_pe(), sparse, *dense)
        return masks[:, : self.network.masks], iou[:, : self.network.masks]


def build_reference(network: Network, tensors: Mapping[str, Tensor]) -> ReferenceNetwork:
    """The reference network holding a checkpoint's weights, in float32, for inference."""
    shapes = Shapes({key: tuple(value.shape) for key, value in tensors.items()})
    with torch.device("meta"):
        reference = ReferenceNetwork(network, shapes)
    wanted = {key for key in reference.state_dict() if not key.endswith("num_batches_tracked")}
    reference.load_state_dict({key: tensors[key] for key in wanted}, strict=False, assign=True)
    return reference.eval().requires_grad_(False)
