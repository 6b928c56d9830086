"""Commands that take a checkpoint: inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medsa_deploy import stages

from . import console
from .bundle_tables import print_export, print_inspection
from .options import Base, Checkpoint, Images, Json, with_overrides


@with_overrides
def inspect(checkpoint: Checkpoint, overrides: Any, base: Base = None, json: Json = False) -> None:
    """Say what a checkpoint is, and what it does not settle.

    medsa-deploy inspect ckpt.pth
    """
    found = stages.inspect_checkpoint(checkpoint, base=base, overrides=overrides)
    console.print_json(found) if json else print_inspection(found)


@with_overrides
def export(
    checkpoint: Checkpoint,
    overrides: Any,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The bundle to make")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle")] = False,
    base: Base = None,
    images: Images = None,
    json: Json = False,
) -> None:
    """Export a checkpoint as a bundle, proved equal to its own network.

    medsa-deploy export ckpt.pth

    medsa-deploy export adapters.pth --base sam_vit_b_01ec64.pth --images my-images/

    medsa-deploy export medsam_vit_b.pth --preprocess medsam

    medsa-deploy export volumes.pth --depth-chunk 8 --intensity-window -175,250
    """
    with console.steps() as on_step:
        made = stages.export_checkpoint(
            checkpoint,
            output=output,
            base=base,
            images=images,
            overrides=overrides,
            force=force,
            on_step=on_step,
        )
    console.print_json(made) if json else print_export(made)
