"""medsa-deploy build-engine: a bundle → engines in it, and how they were built in a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from medsa_deploy import stages
from medsa_deploy.errors import UsageError
from medsa_deploy.nvidia.tensorrt_api import NAMES

from . import console
from .options import Json, MaxMemory, with_options
from .values import parse_range


def _axis(axis: str) -> Any:
    """The option for the sizes of one axis in the optimization profile."""
    return typer.Option(metavar="MIN,OPT,MAX", help=f"Sizes of an axis: {axis}")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of build-engine."""

    fp16: Annotated[bool, typer.Option("--fp16", help="Build from the float16 graphs; default")] = (
        False
    )
    int8: Annotated[bool, typer.Option("--int8", help="Build from the INT8 graphs")] = False
    fp32: Annotated[bool, typer.Option("--fp32", help="Build from the float32 graphs")] = False
    flavor: Annotated[
        Literal["tensorrt", "rtx"] | None,
        typer.Option(help="TensorRT, for this machine's GPU, or TensorRT-RTX, which needs no GPU"),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="smXX", help="rtx: compute capability to build for, repeatable; default all"
        ),
    ] = None
    batch: Annotated[str | None, _axis("images of an encoder run")] = None
    points: Annotated[str | None, _axis("points of a prompt, padding included; 0: none")] = None
    prompts: Annotated[str | None, _axis("prompts of a decoder run")] = None
    embeddings: Annotated[str | None, _axis("embeddings of a decoder run")] = None
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="int8: your images, needed if the bundle has no INT8 graphs"),
    ] = None
    max_memory: MaxMemory = None
    workspace: Annotated[
        float | None, typer.Option(metavar="GB", help="Limit of the builder's scratch memory")
    ] = None
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="tensorrt: how long to search for kernels")
    ] = None
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: file that keeps kernel timings between builds")
    ] = None
    no_tf32: Annotated[
        bool, typer.Option("--no-tf32", help="Compute float32 products in full float32")
    ] = False
    no_fused_attention: Annotated[
        bool, typer.Option("--no-fused-attention", help="Keep attention as products and a softmax")
    ] = False

    def request(self) -> stages.EngineRequest:
        """The options as values; UsageError for options that exclude each other."""
        precisions = {"fp16": self.fp16, "int8": self.int8, "fp32": self.fp32}
        chosen = [name for name, on in precisions.items() if on]
        if len(chosen) > 1:
            raise UsageError("give one of --fp16, --int8 and --fp32")
        return stages.EngineRequest(
            precision=chosen[0] if chosen else "fp16",
            flavor=self.flavor,
            targets=tuple(self.target or ()),
            batch=parse_range(self.batch, "--batch"),
            points=parse_range(self.points, "--points", least=0),
            prompts=parse_range(self.prompts, "--prompts"),
            embeddings=parse_range(self.embeddings, "--embeddings"),
            calibration=tuple(self.calibration or ()),
            workspace_gb=self.workspace,
            optimization_level=self.optimization_level,
            timing_cache=self.timing_cache,
            tf32=not self.no_tf32,
            fused_attention=not self.no_fused_attention,
        )


@with_options
def build_engine(
    options: BuildOptions,
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle; default the newest in the working folder")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be built and why; write nothing")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if the engines are up to date")
    ] = False,
    json: Json = False,
) -> None:
    """Build TensorRT or TensorRT-RTX engines into a bundle.

    medsa-deploy build-engine --fp16

    medsa-deploy build-engine ckpt.medsa --flavor rtx --target sm86 --target sm89

    medsa-deploy build-engine ckpt.medsa --int8 --calibration my-images/ --prompts 1,1,16
    """
    request = options.request()
    with console.steps() as (on_step, on_progress):
        result = stages.build_engines(
            bundle,
            request,
            force=force,
            dry_run=dry_run,
            on_note=console.print_note,
            on_step=on_step,
            on_progress=on_progress,
        )
    console.print_json(result) if json else _print_build(result)


def _print_build(result: stages.EngineBuild) -> None:
    plan, engine = result.plan, result.engine
    if engine is None:
        state = "would be built" if plan.reasons else "up to date"
    else:
        state = f"built in {result.seconds:.0f} s" if result.built else "up to date"
    console.out.print(f"[bold green]{escape(str(plan.folder))}[/]  {state}")
    for reason in plan.reasons:
        console.out.print(f"  because: {escape(reason)}", style="dim")
    console.print_facts(_plan_facts(plan))
    table = console.plain_table("input", "smallest", "optimal", "largest")
    for planned in plan.engines:
        for name, shapes in planned.profile.items():
            cells = ["×".join(map(str, shape)) for shape in shapes]
            table.add_row(f"{planned.role} {name}", *cells)
    console.out.print(table)
    if engine is not None:
        console.out.print()
        table = console.plain_table("engine", "size", "attention", "built in")
        for file in engine.files:
            size = f"{file.bytes / 1e6:.1f} MB"
            table.add_row(file.path, size, file.attention, f"{file.seconds:.1f} s")
        console.out.print(table)
        if engine.state == "built":
            console.out.print("built, not run: their masks are unknown until a GPU has run them")


def _plan_facts(plan: stages.EnginePlan) -> dict[str, str]:
    options = plan.options
    switches = {"TF32": options.tf32, "fused attention": options.fused_attention}
    facts = {
        "library": f"{NAMES[plan.library.flavor]} {plan.library.version}",
        "precision": options.precision + (", made first" if plan.makes_graphs else ""),
        "targets": ", ".join(options.targets),
        "allowed": ", ".join(name for name, on in switches.items() if on)
        or "neither TF32 nor fused attention",
    }
    if options.workspace_gb is not None:
        facts["workspace"] = f"{options.workspace_gb:g} GB"
    if options.optimization_level is not None:
        facts["optimization level"] = str(options.optimization_level)
    return facts
