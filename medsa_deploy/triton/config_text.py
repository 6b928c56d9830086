"""A model's configuration → the text of `config.pbtxt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .tensors import TRITON_TYPES, WireTensor

CONFIG_FILENAME = "config.pbtxt"
Device = Literal["cpu", "gpu"]
ModelBackend = Literal["python", "onnxruntime", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class SequenceBatching:
    """Requests of one sequence go to one instance, which keeps their image."""

    idle_microseconds: int
    """Time without a request after which a sequence is forgotten."""
    most_sequences: int
    """Sequences of one instance; further ones wait."""


@dataclass(frozen=True, kw_only=True)
class DynamicBatching:
    """Requests that arrive close together run as one batch."""

    preferred: tuple[int, ...]
    delay_microseconds: int
    """Time that a request waits for others."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """A request that runs before the model is called ready."""

    batch_size: int
    dims: Mapping[str, tuple[int, ...]]
    """Sizes of each input, without the batch axis."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `config.pbtxt` holds."""

    name: str
    backend: ModelBackend
    inputs: tuple[WireTensor, ...]
    outputs: tuple[WireTensor, ...]
    instances: int
    device: Device
    most_in_batch: int = 0
    """0: requests carry all axes, and are not joined."""
    batching: SequenceBatching | DynamicBatching | None = None
    warm_up: WarmUp | None = None
    filename: str | None = None
    """Of the model's file; None for the backend's usual name."""
    capability_files: Mapping[str, str] = field(default_factory=dict)
    """Compute capability, such as 8.6, → the file for GPUs of that kind."""
    parameters: Mapping[str, str] = field(default_factory=dict)


def config_text(config: ModelConfig) -> str:
    """The text that Triton reads."""
    lines = [
        f"name: {quoted(config.name)}",
        _backend_line(config.backend),
        f"max_batch_size: {config.most_in_batch}",
        "version_policy { latest { num_versions: 1 } }",
        f"instance_group [ {{ count: {config.instances} kind: KIND_{config.device.upper()} }} ]",
    ]
    if config.filename is not None:
        lines.append(f"default_model_filename: {quoted(config.filename)}")
    lines += [
        f"cc_model_filenames {{ key: {quoted(capability)} value: {quoted(name)} }}"
        for capability, name in config.capability_files.items()
    ]
    for kind, tensors in (("input", config.inputs), ("output", config.outputs)):
        for tensor in tensors:
            lines += _tensor_lines(kind, tensor)
    lines += _batching_lines(config.batching)
    if config.warm_up is not None:
        lines += _warm_up_lines(config.warm_up, config.inputs)
    for key, value in config.parameters.items():
        lines.append(
            f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"
        )
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    r"""A string of protobuf's text format.

    >>> print(quoted('a "b"'))
    "a \"b\""
    """
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return f'"{text}"'


def _backend_line(backend: ModelBackend) -> str:
    if backend == "tensorrt":
        return 'platform: "tensorrt_plan"'
    return f"backend: {quoted(backend)}"


def _tensor_lines(kind: str, tensor: WireTensor) -> list[str]:
    optional = " optional: true" if tensor.optional else ""
    return [
        *([f"# {tensor.description}"] if tensor.description else []),
        f"{kind} {{ name: {quoted(tensor.name)} data_type: {TRITON_TYPES[tensor.dtype]} "
        f"dims: {_numbers(tensor.dims)}{optional} }}",
    ]


def _batching_lines(batching: SequenceBatching | DynamicBatching | None) -> list[str]:
    match batching:
        case SequenceBatching():
            return [
                "sequence_batching {",
                f"  max_sequence_idle_microseconds: {batching.idle_microseconds}",
                f"  oldest {{ max_candidate_sequences: {batching.most_sequences} }}",
                "}",
            ]
        case DynamicBatching():
            return [
                "dynamic_batching {",
                f"  preferred_batch_size: {_numbers(batching.preferred)}",
                f"  max_queue_delay_microseconds: {batching.delay_microseconds}",
                "}",
            ]
    return []


def _warm_up_lines(warm_up: WarmUp, inputs: Sequence[WireTensor]) -> list[str]:
    types = {tensor.name: TRITON_TYPES[tensor.dtype] for tensor in inputs}
    entries = [
        f"  inputs {{ key: {quoted(name)} value {{ data_type: {types[name]} "
        f"dims: {_numbers(dims)} zero_data: true }} }}"
        for name, dims in warm_up.dims.items()
    ]
    return [
        "model_warmup {",
        f'  name: "zeros" batch_size: {warm_up.batch_size}',
        *entries,
        "}",
    ]


def _numbers(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"
