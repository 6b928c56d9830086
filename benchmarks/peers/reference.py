"""A checkpoint → its reference network in PyTorch: what it gives, what it costs, as plain ONNX."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import OPSET
from medsa_deploy.exporters.networks import build_reference
from medsa_deploy.exporters.reference import ReferenceBackend, ReferenceNetwork
from medsa_deploy.images import Image
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.interface import Array

PATCH = 96
"""Side of the cube that Swin-UNETR sees."""
SWIN_FEATURES = 48
SWIN_CLASSES = 4
POINTS = 2
"""Of the prompt that the plain export is traced with, and FLOPs are counted of: a box's corners."""


class Decoder(nn.Module):
    """The reference network's decoder for prompts without a mask."""

    def __init__(self, reference: ReferenceNetwork) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, image_embeddings: Tensor, coords: Tensor, labels: Tensor) -> Any:
        """(1, 256, g, g), (1, N, 2), (1, N) → (1, K, 4g, 4g), (1, K)."""
        return self.reference.decode(image_embeddings, coords, labels)


def reference_of(checkpoint: Path, overrides: Overrides) -> ReferenceNetwork:
    """The reference network of a checkpoint."""
    loaded = load_checkpoint(checkpoint)
    return build_reference(infer(loaded, overrides).network, loaded.tensors)


def swin_unetr() -> nn.Module:
    """MONAI's Swin-UNETR with seeded weights: (1, 1, 96, 96, 96) → (1, 4, 96, 96, 96)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import SwinUNETR
    network: nn.Module = SwinUNETR(
        in_channels=1, out_channels=SWIN_CLASSES, feature_size=SWIN_FEATURES
    )
    return network.eval().requires_grad_(False)


def modules(spec: Mapping[str, Any]) -> tuple[nn.Module, nn.Module | None]:
    """Encoder and decoder that a worker's spec names: a checkpoint's, or Swin-UNETR alone."""
    if "checkpoint" not in spec:
        return swin_unetr(), None
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["overrides"].items()}
    reference = reference_of(Path(spec["checkpoint"]), Overrides(**overrides))
    return reference.image_encoder, Decoder(reference)


def as_json(overrides: Overrides) -> dict[str, Any]:
    """What `modules` takes for a checkpoint's overrides."""
    return {k: v for k, v in asdict(overrides).items() if v is not None}


class Recorder(ReferenceBackend):
    """The reference network; everything that goes in and comes out is kept for the workers."""

    def __init__(self, reference: ReferenceNetwork) -> None:
        super().__init__(reference)
        self.tensors: dict[str, Array] = {}
        self._sets = 0
        self.slice = 0

    def encode(self, image: Array) -> Array:
        """See `Backend.encode`."""
        embeddings = super().encode(image)
        self._k = sum(name.startswith("image_") for name in self.tensors)
        self._sets = 0
        self.tensors |= {f"image_{self._k}": image, f"embeddings_{self._k}": embeddings}
        return embeddings

    def decode(
        self, image_embeddings: Array, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`."""
        logits, scores = super().decode(image_embeddings, point_coords, point_labels, mask)
        place = f"{self._k}_{self._sets}"
        self.tensors |= {
            f"coords_{place}": point_coords,
            f"labels_{place}": point_labels,
            f"logits_{place}": logits,
            f"slice_{place}": np.array(self.slice),
        }
        self._sets += 1
        return logits, scores


def record(
    reference: ReferenceNetwork,
    manifest: Manifest,
    work: Sequence[tuple[list[Image], list[tuple[float, ...]]]],
) -> dict[str, Array]:
    """Inputs and outputs of the reference network, as `worker.agreement` takes them.

    Boxes are decoded one by one, on the middle image of those that are encoded together.
    """
    recorder = Recorder(reference)
    with Session(manifest, recorder) as session:
        for images, boxes in work:
            embeddings = session.encode_slices(images)
            recorder.slice = len(images) // 2
            for box in boxes:
                prompts = transforms.prompts(box=box)
                session.segment_sets(embeddings[recorder.slice], prompts)
    return recorder.tensors


def gflop(reference: nn.Module, *inputs: Tensor) -> float:
    """Billions of floating-point operations of a run: of products and convolutions, two for each
    multiplication and addition, as torch counts them."""
    module = copy.deepcopy(reference).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops() / 1e9


def costs(reference: ReferenceNetwork, images: int) -> dict[str, float]:
    """GFLOP of one encoding and of one decoding of a box."""
    network = reference.network
    side, g = network.image_size, network.embedding_size
    embedding, coords = torch.zeros(1, 256, g, g), torch.zeros(1, POINTS, 2)
    labels = torch.tensor([[2.0, 3.0]])
    return {
        "encoder": gflop(reference.image_encoder, torch.zeros(images, 3, side, side)),
        "decoder": gflop(Decoder(reference), embedding, coords, labels),
    }


def plain_export(reference: ReferenceNetwork, folder: Path, images: int) -> None:
    """`torch.onnx.export` of the reference network: plain-encoder.onnx and plain-decoder.onnx.

    The decoder takes any number of points.
    """
    network = reference.network
    side, g = network.image_size, network.embedding_size
    export_onnx(
        reference.image_encoder,
        (torch.zeros(images, 3, side, side),),
        folder / "plain-encoder.onnx",
        inputs=["image"],
        outputs=["image_embeddings"],
    )
    points = torch.export.Dim("N", min=1, max=256)
    export_onnx(
        Decoder(reference),
        (torch.zeros(1, 256, g, g), torch.zeros(1, 5, 2), torch.zeros(1, 5)),
        folder / "plain-decoder.onnx",
        inputs=["image_embeddings", "point_coords", "point_labels"],
        outputs=["low_res_masks", "iou_predictions"],
        dynamic_shapes=(None, {1: points}, {1: points}),
    )


def export_onnx(
    module: nn.Module,
    examples: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: Any = None,
) -> None:
    """One module as an ONNX file, written whole or not at all."""
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            examples,
            partial,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            external_data=False,
            verbose=False,
        )
    partial.replace(path)
