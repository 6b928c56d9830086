"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medsa_deploy.stages.inspect import export_extra

from .values import parse_depth_chunk, parse_names, parse_numbers, parse_window

Checkpoint = Annotated[Path, typer.Argument(help="`.pth`, `.pt` or `.safetensors`")]
Bundle = Annotated[Path, typer.Argument(help="A bundle: the folder that export made")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout")]
Base = Annotated[Path | None, typer.Option(help="SAM checkpoint an adapter-only file goes over")]
Images = Annotated[Path | None, typer.Option(help="Your images, added to the proof")]
IntensityWindow = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Intensities of black and white, such as -175,250"),
]
Threshold = Annotated[float | None, typer.Option(help="Probability above which a pixel is mask")]
Backend = Annotated[
    str,
    typer.Option(
        help="onnxruntime, openvino, or auto: what doctor --tune found; on an NVIDIA GPU tensorrt, "
        "rtx and onnxruntime-cuda"
    ),
]
Fallback = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Backend that takes over if the one before cannot run; again for more"
    ),
]
NoCudaGraphs = Annotated[
    bool, typer.Option("--no-cuda-graphs", help="tensorrt, rtx: replay no CUDA graphs")
]
Precision = Annotated[
    str,
    typer.Option(
        help="Precision of the graphs to run; in OpenVINO also bf16 and int8-bf16, which compute "
        "what is float32 in bfloat16"
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads; default all cores")]


def sizes(what: str) -> Any:
    """The option of an optimization profile's axis."""
    return typer.Option(metavar="MIN,OPT,MAX", help=what.capitalize())


@dataclass(frozen=True, kw_only=True)
class OverrideOptions:
    """Options that overrule what a checkpoint shows, or say what it does not."""

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
        typer.Option(help="3D: how slices are grouped; checkpoints of the public code: public"),
    ] = None
    preprocess: Annotated[
        Literal["medsa", "sam", "medsam", "litemedsam"] | None,
        typer.Option(help="How images become the network's input"),
    ] = None
    intensity_window: IntensityWindow = None
    point_order: Annotated[
        Literal["xy", "yx"] | None,
        typer.Option(help="Order of coordinates the network was trained on"),
    ] = None
    point_frame: Annotated[
        Literal["network", "image"] | None, typer.Option(help="Frame of coordinates, likewise")
    ] = None
    prompt_scope: Annotated[
        Literal["chunk", "slice"] | None,
        typer.Option(help="3D: whether prompts are for their chunk of slices, or their slice"),
    ] = None
    point_scale: Annotated[
        float | None, typer.Option(help="What training multiplied coordinates by")
    ] = None
    pad_points: Annotated[
        int | None, typer.Option(help="Points efficient_sam's prompts are padded to; 0 for none")
    ] = None
    threshold: Threshold = None
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of the classes: liver,spleen")
    ] = None


def with_overrides(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `overrides`, as typer wants it: with a parameter for each option."""
    options = signature(OverrideOptions, eval_str=True).parameters
    own = signature(command, eval_str=True).parameters

    @wraps(command)
    def flat(**given: Any) -> None:
        options_given = OverrideOptions(**{name: given.pop(name) for name in options})
        command(**given, overrides=_overrides(options_given))

    parameters = [p for name, p in own.items() if name != "overrides"] + [*options.values()]
    flat.__dict__["__signature__"] = Signature(
        [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    )
    return flat


def _overrides(options: OverrideOptions) -> Any:
    """The options as `Overrides`, which come with torch."""
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
