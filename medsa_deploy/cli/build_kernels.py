"""medsa-deploy build-kernels: a bundle → compiled CUDA kernels in it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from medsa_deploy import stages

from . import console
from .options import Bundle, Json


def build_kernels(
    bundle: Bundle,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="smXX",
            help="Compute capability to compile for, repeatable; computeXX for PTX, which newer "
            "GPUs take as well; default the common ones, and PTX",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compile the CUDA kernels into a bundle, so that a device needs no compiler.

    medsa-deploy build-kernels ckpt.medsa

    medsa-deploy build-kernels ckpt.medsa --target sm87 --target sm110
    """
    with console.steps() as (on_step, _):
        result = stages.build_bundle_kernels(bundle, target or (), on_step=on_step)
    console.print_json(result) if json else _print_build(result)


def _print_build(result: stages.KernelBuild) -> None:
    folder = escape(str(result.bundle / result.folder))
    console.out.print(
        f"[bold green]{folder}[/]  compiled by {result.compiler} in {result.seconds:.0f} s"
    )
    console.print_files([(file.path, file.bytes) for file in result.files])
