"""A bundle and options → the configurations of its models on a Triton server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medsa_deploy.bundle.manifest import GraphContract, Manifest, Role, manifest_to_json
from medsa_deploy.errors import BundleError, UsageError

from .config_text import (
    Device,
    DynamicBatching,
    ModelBackend,
    ModelConfig,
    SequenceBatching,
    WarmUp,
)
from .python_model import PROTOCOL
from .tensors import INPUTS, OUTPUTS, WireTensor, can_batch, graph_tensors

Graph = Literal["encoder", "decoder", "decoder-image", "decoder-click"]
GRAPHS: tuple[Graph, ...] = ("encoder", "decoder", "decoder-image", "decoder-click")
BOTH_PARTS: tuple[Graph, ...] = ("encoder", "decoder")
MOST_CHUNKS = 4
"""Images, or chunks of a 3D network, in one encoder run: each takes memory."""
MOST_CLICKS = 8
"""Prompt sets in one decoder run."""
ENCODER_DELAY, DECODER_DELAY = 2000, 500
"""Microseconds that a request waits for others: little beside the run that it shares."""
MOST_SEQUENCES = 1024
"""Sequences of one instance. The memory for embeddings is reached first, and refuses with a reason;
a sequence over this number would only wait."""
SEGMENT_INSTANCES = 3
"""Instances of NAME_segment for each of the encoder: while one is encoding, two can be joined."""
WARM_UP_POINTS = 2
"""A click and its padding point."""


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """How the models of a repository run."""

    backend: ModelBackend = "python"
    """What runs encoder and decoder; the models that take images are always python models."""
    device: Device | None = None
    """None: the backend's usual one."""
    instances: int = 1
    """Of each model."""
    precision: str = "fp32"
    embedding_bytes: int = 1 << 30
    """Memory for embeddings of one instance of a session model."""
    idle_seconds: float = 600.0
    """Time without a request after which an image is dropped."""

    def __post_init__(self) -> None:
        """UsageError for options that exclude each other, or that no server can run with."""
        if self.instances < 1:
            raise UsageError(f"--instances {self.instances}: expected 1 or more")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise UsageError("--backend tensorrt runs on GPUs only: leave --device cpu out")
        if self.idle_seconds <= 0:
            raise UsageError(f"an idle time of {self.idle_seconds:g} s: expected more than 0")

    @property
    def used_device(self) -> Device:
        """Where the models run."""
        return self.device or ("gpu" if self.backend == "tensorrt" else "cpu")

    @property
    def runtime(self) -> str:
        """The backend of the python models' sessions."""
        if self.used_device == "cpu":
            return "onnxruntime"
        return "tensorrt" if self.backend == "tensorrt" else "onnxruntime-cuda"


@dataclass(frozen=True, kw_only=True)
class BundleOnServer:
    """A bundle as the models of a repository name it."""

    name: str
    """Beginning of the models' names."""
    folder: str
    """The bundle's folder in each python model."""
    manifest: Manifest
    sha256: str
    """Of the bytes of manifest.json, which lists the SHA-256 of every file."""


def served_graphs(manifest: Manifest, options: RepositoryOptions) -> tuple[Graph, ...]:
    """The graphs that get models of their own; BundleError if the precision is missing."""
    for role in BOTH_PARTS:
        manifest.file(role, options.precision)
    if options.backend != "onnxruntime":
        return BOTH_PARTS
    return tuple(graph for graph in GRAPHS if manifest.has(graph, options.precision))


def python_models(bundle: BundleOnServer, options: RepositoryOptions) -> list[ModelConfig]:
    """The models that take images and prompts: NAME_session and NAME_segment."""
    session = ModelConfig(
        name=f"{bundle.name}_session",
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        instances=options.instances,
        device=options.used_device,
        batching=SequenceBatching(
            idle_microseconds=round(1e6 * options.idle_seconds), most_sequences=MOST_SEQUENCES
        ),
        parameters=bundle_parameters(bundle, options)
        | {
            "embedding_bytes": str(options.embedding_bytes),
            "idle_seconds": f"{options.idle_seconds:g}",
            "manifest": manifest_to_json(bundle.manifest),
        },
    )
    segment = ModelConfig(
        name=f"{bundle.name}_segment",
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        instances=SEGMENT_INSTANCES * options.instances,
        device=options.used_device,
        parameters=bundle_parameters(bundle, options)
        | {"encoder_model": model_name(bundle, "encoder")},
    )
    return [session, segment]


def graph_model(
    bundle: BundleOnServer,
    graph: Graph,
    options: RepositoryOptions,
    *,
    filename: str | None = None,
    capability_files: dict[str, str] | None = None,
    engine_batch: int | None = None,
) -> ModelConfig:
    """The model of one graph: a python model, an ONNX file or TensorRT plans.

    `engine_batch`: the largest batch that the plans take.
    """
    contract = contract_of(bundle.manifest, graph)
    tensors = (*contract.inputs, *contract.outputs)
    encoder, chunk = graph == "encoder", bundle.manifest.network.chunk
    batched = can_batch(contract.inputs)
    most = (MOST_CHUNKS * chunk if encoder else MOST_CLICKS) if batched else 0
    if batched and engine_batch is not None:
        most = min(most, engine_batch)
    preferred = sorted({min(2 * chunk, most) if encoder else max(most // 2, 1), most})
    inputs = graph_tensors(contract.inputs, batched=batched)
    for tensor in tensors:
        if tensor.dtype != "float32":
            raise BundleError(f"{graph}: {tensor.name} is {tensor.dtype}, expected float32")
    return ModelConfig(
        name=model_name(bundle, graph),
        backend=options.backend,
        inputs=inputs,
        outputs=graph_tensors(contract.outputs, batched=batched),
        instances=options.instances,
        device=options.used_device,
        most_in_batch=most,
        batching=DynamicBatching(
            preferred=tuple(preferred),
            delay_microseconds=ENCODER_DELAY if encoder else DECODER_DELAY,
        )
        if batched
        else None,
        warm_up=WarmUp(
            batch_size=chunk if encoder else int(batched),
            dims={tensor.name: warm_up_dims(tensor, batched=batched) for tensor in inputs},
        ),
        filename=filename,
        capability_files=capability_files or {},
        parameters=bundle_parameters(bundle, options) | {"role": graph},
    )


def bundle_parameters(bundle: BundleOnServer, options: RepositoryOptions) -> dict[str, str]:
    """The parameters of every model: what it was written from."""
    return {
        "medsa_protocol": PROTOCOL,
        "bundle": bundle.folder,
        "bundle_sha256": bundle.sha256,
        "checkpoint_sha256": bundle.manifest.source.sha256,
        "precision": options.precision,
        "runtime": options.runtime,
    }


def model_name(bundle: BundleOnServer, graph: Role) -> str:
    """NAME_encoder, NAME_decoder, NAME_decoder_image or NAME_decoder_click."""
    return f"{bundle.name}_{graph.replace('-', '_')}"


def contract_of(manifest: Manifest, graph: Graph) -> GraphContract:
    """The tensors of a graph; BundleError if the manifest does not have them."""
    if graph not in manifest.graphs:
        raise BundleError(
            f"the manifest has no tensors of {graph}, only of {', '.join(manifest.graphs)}: export "
            "the checkpoint again"
        )
    return manifest.graphs[graph]


def warm_up_dims(tensor: WireTensor, *, batched: bool) -> tuple[int, ...]:
    """Sizes of an input for the request that warms a model up: one click on one image."""
    sets = 0 if batched else 1
    return tuple(
        axis if axis > 0 else (1 if i < sets else WARM_UP_POINTS)
        for i, axis in enumerate(tensor.dims)
    )


def unique_name(name: str, names: Sequence[str]) -> str:
    """The name, unless another bundle has it; UsageError."""
    if name in names:
        raise UsageError(f"two bundles are called {name}: rename one of the folders")
    return name
