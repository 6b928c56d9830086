"""medsa-deploy inspect: a checkpoint → its network's facts, in a table."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from rich.markup import escape

from medsa_deploy import stages

from . import console
from .network_facts import print_guesses, print_network
from .options import (
    Base,
    Checkpoint,
    Json,
    OverrideOptions,
    Prefix,
    Weights,
    overrides_of,
    with_options,
)

if TYPE_CHECKING:
    from medsa_deploy.exporters.lora import LoRA


@with_options
def inspect(
    checkpoint: Checkpoint,
    overrides: OverrideOptions,
    base: Base = None,
    weights: Weights = None,
    prefix: Prefix = None,
    json: Json = False,
) -> None:
    """Show what network a checkpoint holds.

    Anything that cannot be determined is printed, with the option that sets it.

    medsa-deploy inspect ckpt.pth
    """
    inspection = stages.inspect_checkpoint(
        checkpoint,
        base=base,
        overrides=overrides_of(overrides),
        weights=weights,
        prefix=prefix,
    )
    console.print_json(inspection) if json else _print_inspection(inspection)


def _print_inspection(inspection: stages.Inspection) -> None:
    source = inspection.source
    base = f" over {source.base}" if source.base else ""
    console.out.print(
        f"[bold]{escape(source.checkpoint)}[/]  {source.container}{base}, {source.dtype}"
    )
    print_network(inspection.network, inspection.conventions)
    if inspection.lora:
        console.out.print("\nLow-rank updates, merged into:")
        table = console.plain_table()
        for (linear, kind, rank), count in Counter(map(_any_block, inspection.lora)).items():
            table.add_row(f"{count}×", escape(linear), kind, f"rank {rank}")
        console.out.print(table)
    print_guesses(inspection.guesses)


def _any_block(lora: LoRA) -> tuple[str, str, int]:
    """A low-rank update without its block's number, so that equal ones are counted together."""
    return re.sub(r"\.\d+\.", ".*.", lora.linear), lora.kind, lora.rank
