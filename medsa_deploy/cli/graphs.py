"""Commands that add to a bundle: quantize, build-engine, build-kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medsa_deploy import stages
from medsa_deploy.errors import UsageError

from . import console
from .graph_tables import print_engines, print_kernels, print_quantization
from .options import Bundle, Images, Json, Threads, sizes
from .values import parse_range


def quantize(
    bundle: Bundle,
    fp16: Annotated[bool, typer.Option("--fp16", help="Float16 weights and arithmetic")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="INT8 linear layers, the rest float16")
    ] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Your images, or folders of them, that INT8 is fitted to"),
    ] = None,
    target: Annotated[
        Literal["tensorrt", "cpu"], typer.Option("--for", help="What will run the INT8 graphs")
    ] = "tensorrt",
    images: Images = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Add float16 or INT8 graphs to a bundle, proved to give its masks.

    medsa-deploy quantize ckpt.medsa --fp16

    medsa-deploy quantize ckpt.medsa --int8 --calibration my-images/

    medsa-deploy quantize ckpt.medsa --int8 --calibration my-images/ --for cpu
    """
    if fp16 == int8:
        raise UsageError("give one of --fp16 and --int8")
    with console.steps_of_images() as (on_step, on_image):
        made = stages.quantize_bundle(
            bundle,
            precision="fp16" if fp16 else "int8",
            calibration=calibration or (),
            target=target,
            images=images,
            threads=threads,
            on_step=on_step,
            on_image=on_image,
        )
    console.print_json(made) if json else print_quantization(made)


def build_engine(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle; default the newest in the working folder")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="From the float16 graphs; default")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="From the INT8 graphs")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="From the float32 graphs")] = False,
    flavor: Annotated[
        Literal["tensorrt", "rtx"] | None,
        typer.Option(help="TensorRT, on the GPU here, or TensorRT-RTX, which needs none to build"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="smXX", help="rtx: compute capability to build for; default all"),
    ] = None,
    batch: Annotated[str | None, sizes("images of an encoder run")] = None,
    points: Annotated[str | None, sizes("points of a prompt, padding point included")] = None,
    prompts: Annotated[str | None, sizes("prompts of a decoder run")] = None,
    embeddings: Annotated[str | None, sizes("embeddings of a decoder run")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="int8: your images, where the bundle has no INT8 yet")
    ] = None,
    workspace: Annotated[
        float | None, typer.Option(metavar="GB", help="Limit of the builder's scratch memory")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="tensorrt: how long to search for kernels")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: times of kernels, kept between builds")
    ] = None,
    no_tf32: Annotated[
        bool, typer.Option("--no-tf32", help="Compute float32 products in full float32")
    ] = False,
    no_fused_attention: Annotated[
        bool, typer.Option("--no-fused-attention", help="Keep attention as products and a softmax")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, and why; write nothing")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build what is up to date, too")] = False,
    json: Json = False,
) -> None:
    """Build TensorRT or TensorRT-RTX engines into a bundle.

    medsa-deploy build-engine --fp16

    medsa-deploy build-engine ckpt.medsa --flavor rtx --target sm86 --target sm89

    medsa-deploy build-engine ckpt.medsa --int8 --calibration my-images/ --prompts 1,1,16
    """
    chosen = [name for name, on in {"fp16": fp16, "int8": int8, "fp32": fp32}.items() if on]
    if len(chosen) > 1:
        raise UsageError("give one of --fp16, --int8 and --fp32")
    request = stages.EngineRequest(
        precision=chosen[0] if chosen else "fp16",
        flavor=flavor,
        targets=tuple(target or ()),
        batch=parse_range(batch, "--batch"),
        points=parse_range(points, "--points"),
        prompts=parse_range(prompts, "--prompts"),
        embeddings=parse_range(embeddings, "--embeddings"),
        calibration=tuple(calibration or ()),
        workspace_gb=workspace,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        tf32=not no_tf32,
        fused_attention=not no_fused_attention,
    )
    with console.steps_of_images() as (on_step, on_progress):
        made = stages.build_engines(
            bundle,
            request,
            force=force,
            dry_run=dry_run,
            on_note=console.print_note,
            on_step=on_step,
            on_progress=on_progress,
        )
    console.print_json(made) if json else print_engines(made)


def build_kernels(
    bundle: Bundle,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="smXX", help="Compute capability to compile for; default the usual"),
    ] = None,
    json: Json = False,
) -> None:
    """Compile the CUDA kernels into a bundle, so that a device needs no compiler.

    medsa-deploy build-kernels ckpt.medsa

    medsa-deploy build-kernels ckpt.medsa --target sm87 --target sm110
    """
    with console.steps() as on_step:
        made = stages.build_kernels(bundle, target or (), on_step=on_step)
    console.print_json(made) if json else print_kernels(made)
