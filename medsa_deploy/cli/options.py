"""Options that several commands share, and dataclasses of options as a command's parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medsa_deploy.bundle.manifest import PostprocessingName, PreprocessingName
from medsa_deploy.images.limits import VARIABLE, parse_size
from medsa_deploy.runtime import BackendName
from medsa_deploy.runtime import Precision as PrecisionName
from medsa_deploy.stages.inspect import export_extra

from .values import parse_depth_chunk, parse_names, parse_numbers, parse_window

Checkpoint = Annotated[Path, typer.Argument(help="`.pth`, `.pt` or `.safetensors`")]
Bundle = Annotated[Path, typer.Argument(help="A bundle: the folder that export wrote")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout")]
Base = Annotated[
    Path | None, typer.Option(help="SAM checkpoint that an adapter-only checkpoint belongs to")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Which of several weights in the file, such as ema.model"),
]
Prefix = Annotated[
    str | None,
    typer.Option(help="Beginning of the network's keys, if several networks are in the weights"),
]
Images = Annotated[Path | None, typer.Option(help="Your images, added to the parity check")]
IntensityWindow = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH", help="Intensities that become black and white, such as -175,250"
    ),
]
MeasuredWindow = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH|auto",
        help="Intensities that become black and white, such as -175,250; auto: 0.5 % and 99.5 % of "
        "what is not padding",
    ),
]
Threshold = Annotated[
    float | None, typer.Option(help="Probability above which a pixel belongs to the mask")
]
# `load` refuses other names, and says what there is.
Backend = Annotated[
    BackendName,
    typer.Option(
        parser=str,
        metavar="NAME",
        help="onnxruntime, openvino, or auto (the result of doctor --tune); on an NVIDIA GPU also "
        "tensorrt, rtx and onnxruntime-cuda",
    ),
]
NoCudaGraphs = Annotated[
    bool, typer.Option("--no-cuda-graphs", help="tensorrt, rtx: do not use CUDA graphs")
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        parser=str,
        metavar="NAME",
        help="Precision of the graphs to run; with OpenVINO also bf16 and int8-bf16, which compute "
        "the float32 parts in bfloat16",
    ),
]
Trusted = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="KEYS",
        help="Public key of who may have signed the bundle, a PEM file or a folder of them; "
        "repeatable; default those of $MEDSA_TRUSTED_KEYS, if it is set",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads; default all cores")]


def _limit_memory(size: str | None) -> str | None:
    """Set the budget for reading files, of this process and its children."""
    if size is not None:
        parse_size(size, "--max-memory")
        os.environ[VARIABLE] = size
    return size


MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_limit_memory,
        help="Memory that reading one file may take, such as 16GB; default half of the machine's",
    ),
]


@dataclass(frozen=True, kw_only=True)
class OverrideOptions:
    """Options that set facts of a network instead of reading them from its checkpoint."""

    heads: Annotated[int | None, typer.Option(help="Attention heads of the ViT")] = None
    window_size: Annotated[
        int | None, typer.Option(help="Attention window of the ViT, in tokens")
    ] = None
    global_blocks: Annotated[
        str | None, typer.Option(metavar="I,J,…", help="Global blocks, such as 2,5,8,11")
    ] = None
    image_size: Annotated[
        int | None, typer.Option(help="Side of the network's input, in pixels")
    ] = None
    classes: Annotated[int | None, typer.Option(help="Classes the network was trained for")] = None
    depth_chunk: Annotated[
        str | None,
        typer.Option(metavar="D|none", help="3D: slices that see each other; none: all --slices"),
    ] = None
    slices: Annotated[
        int | None, typer.Option(help="3D: slices of the graph, with --depth-chunk none")
    ] = None
    sd_trans: Annotated[
        Literal["public", "paper"] | None,
        typer.Option(help="3D: how slices are grouped; public for the public code's checkpoints"),
    ] = None
    trained_with: Annotated[
        Literal["med-sa", "sam", "medsam", "sam-med2d", "finetune-sam", "samed", "efficientsam"]
        | None,
        typer.Option(
            help="Code that trained the network, if its keys leave a choice: sets preprocessing, "
            "prompts, which tokens are masks and the order of norm and windows"
        ),
    ] = None
    prompts: Annotated[
        bool | None,
        typer.Option(
            "--prompts/--no-prompts", help="Whether the network was trained with clicks or boxes"
        ),
    ] = None
    preprocess: Annotated[
        PreprocessingName | None, typer.Option(help="How images become the network's input")
    ] = None
    postprocess: Annotated[
        PostprocessingName | None,
        typer.Option(
            help="How logits become masks, if not as the code that trained the network makes them"
        ),
    ] = None
    intensity_window: IntensityWindow = None
    point_order: Annotated[
        Literal["xy", "yx"] | None,
        typer.Option(help="Order of coordinates the network was trained on"),
    ] = None
    point_frame: Annotated[
        Literal["network", "image"] | None,
        typer.Option(help="Frame of coordinates the network was trained on"),
    ] = None
    prompt_scope: Annotated[
        Literal["chunk", "slice"] | None,
        typer.Option(help="3D: whether a prompt is for its chunk of slices or for its slice alone"),
    ] = None
    point_scale: Annotated[
        float | None, typer.Option(help="Factor of coordinates during training")
    ] = None
    pad_points: Annotated[
        int | None,
        typer.Option(help="Points that efficient_sam's prompts are padded to; 0 for no padding"),
    ] = None
    threshold: Threshold = None
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of the classes: liver,spleen")
    ] = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer needs it: each field of a dataclass parameter becomes an option.

    A command is called with the dataclasses, made from their options' values.
    """
    parameters: list[Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            group: Any = parameter.annotation
            groups[name] = group
            parameters += signature(group, eval_str=True).parameters.values()
        else:
            parameters.append(parameter)

    @wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    flat.__dict__["__signature__"] = Signature(
        [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    )
    return flat


def overrides_of(options: OverrideOptions) -> Any:
    """The options as the exporters' `Overrides`, whose import needs torch."""
    blocks, names = options.global_blocks, options.class_names
    parsed = {
        "depth_chunk": parse_depth_chunk(options.depth_chunk),
        "global_blocks": None if blocks is None else parse_numbers(blocks, int, "--global-blocks"),
        "intensity_window": parse_window(options.intensity_window),
        "class_names": None if names is None else parse_names(names),
    }
    with export_extra():
        from medsa_deploy.exporters.architecture import Overrides
    return Overrides(**asdict(options) | parsed)
