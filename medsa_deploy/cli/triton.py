"""medsa-deploy triton: bundles → a model repository for NVIDIA Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from medsa_deploy.images.limits import parse_size

from . import console
from .options import Json, Trusted, with_options

if TYPE_CHECKING:
    from medsa_deploy.triton.models import RepositoryOptions
    from medsa_deploy.triton.repository import Repository


@dataclass(frozen=True, kw_only=True)
class TritonCommandOptions:
    """The options of triton."""

    backend: Annotated[
        Literal["python", "onnxruntime", "tensorrt"],
        typer.Option(help="What runs encoder and decoder; tensorrt takes the bundle's engines"),
    ] = "python"
    device: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(help="Where models run; default gpu for tensorrt, else cpu"),
    ] = None
    instances: Annotated[int, typer.Option(help="Instances of each model")] = 1
    precision: Annotated[str, typer.Option(help="Precision of the graphs to run")] = "fp32"
    cache: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory for embeddings of one session instance"),
    ] = "1GB"
    idle_minutes: Annotated[
        float, typer.Option(help="Minutes without a prompt after which an image is dropped")
    ] = 10.0

    def repository(self) -> RepositoryOptions:
        """How the models run."""
        from medsa_deploy.triton.models import RepositoryOptions

        return RepositoryOptions(
            backend=self.backend,
            device=self.device,
            instances=self.instances,
            precision=self.precision,
            embedding_bytes=parse_size(self.cache, "--cache"),
            idle_seconds=60 * self.idle_minutes,
        )


@with_options
def triton(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles: folders that export wrote")],
    options: TritonCommandOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write")] = Path(
        "models"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier repository")] = False,
    trusted: Trusted = None,
    json: Json = False,
) -> None:
    """Write a model repository for NVIDIA Triton.

    NAME_session keeps an image and answers prompts on it, NAME_segment takes both at once,
    NAME_encoder and NAME_decoder are the bundle's graphs. Applications connect with
    medsa_deploy.remote.

    medsa-deploy triton ckpt.medsa -o models

    medsa-deploy triton liver.medsa brain.medsa -o models --backend onnxruntime --instances 2
    """
    from medsa_deploy.triton.repository import write_repository

    keys = None if trusted is None else tuple(trusted)
    repository = write_repository(bundles, output, options.repository(), force=force, trusted=keys)
    console.print_json(repository) if json else _print_repository(repository)


def _print_repository(repository: Repository) -> None:
    folder = escape(str(repository.folder))
    console.out.print(f"[bold green]{folder}[/]  {len(repository.models)} models")
    for model in repository.models:
        console.out.print(f"  {escape(model.name)}  [dim]{model.backend}[/]")
    console.out.print(f"\ntritonserver --model-repository={folder}")
