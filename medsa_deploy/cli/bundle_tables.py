"""What inspect and export found, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from medsa_deploy.bundle.manifest import Conventions, Network
from medsa_deploy.stages import Export, Inspection

from .console import out, plain_table, print_facts, print_files
from .parity_table import print_parity

if TYPE_CHECKING:
    from medsa_deploy.exporters.lora import LoRA

FAMILIES = {
    "medsa": "Med-SA",
    "sam": "SAM",
    "litemedsam": "LiteMedSAM",
    "mobile_sam": "mobile_sam",
    "efficient_sam": "efficient_sam",
}
ENCODERS = {"vit": "ViT", "tiny_vit": "TinyViT"}


def print_inspection(found: Inspection) -> None:
    """What a checkpoint is."""
    source = found.source
    over = f" over {source.base}" if source.base else ""
    out.print(f"[bold]{escape(source.checkpoint)}[/]  {source.container}{over}, {source.dtype}")
    print_facts(_facts(found.network, found.conventions))
    if found.lora:
        out.print("\nLow-rank updates, merged into:")
        table = plain_table()
        for (linear, kind, rank), count in Counter(map(_alike, found.lora)).items():
            table.add_row(f"{count}×", escape(linear), kind, f"rank {rank}")
        out.print(table)
    print_guesses(found.guesses)


def print_guesses(guesses: Sequence[Any]) -> None:
    """Facts the checkpoint does not settle, and the options that overrule them."""
    if not guesses:
        return
    out.print("\nNot settled by the checkpoint; an option overrules each:")
    table = plain_table()
    for guess in guesses:
        table.add_row(
            guess.fact, f"[bold]{escape(guess.value)}[/]", escape(guess.because), guess.option
        )
    out.print(table)


def print_export(made: Export) -> None:
    """A bundle that was just made."""
    network = made.manifest.network
    out.print(f"[bold green]{escape(str(made.bundle))}[/]  in {made.seconds:.0f} s")
    print_facts(_facts(network, made.manifest.conventions))
    print_guesses(made.guesses)
    print_files([(f.path, f.bytes) for f in made.manifest.files])
    for parity in made.manifest.parity:
        print_parity(parity, "the checkpoint's own network")


def _alike(lora: LoRA) -> tuple[str, str, int]:
    """Linear layers that differ only by their block's number count as one kind."""
    return re.sub(r"\.\d+\.", ".*.", lora.linear), lora.kind, lora.rank


def _facts(network: Network, conventions: Conventions) -> dict[str, str]:
    scope = {"prompts": f"for their {conventions.prompt_scope}"} if network.chunk > 1 else {}
    return _network_facts(network) | _convention_facts(conventions) | scope


def _network_facts(network: Network) -> dict[str, str]:
    share = 100 * network.adapter_parameters / network.parameters
    vit = network.encoder == "vit"
    windows = f", windows of {network.windows[0]}" if vit and network.windows[0] else ""
    outputs = {
        "classes": f"{network.classes} class(es), masks 0…{network.classes - 1}",
        "sam": f"{network.mask_tokens} mask tokens: mask 0, or 1… with multimask",
    }[network.outputs]
    facts = {
        "network": f"{FAMILIES[network.family]}, {ENCODERS[network.encoder]}",
        "encoder": f"width {_list(network.widths)}, {_list(network.depths)} blocks, "
        f"{_list(network.heads)} heads{windows}",
        "image": f"{network.image_size}×{network.image_size} → embedding "
        f"{network.embedding_size}×{network.embedding_size}",
        "parameters": f"{network.parameters / 1e6:.1f} M",
        "adapters": f"{', '.join(network.adapters)} ({share:.1f} % of the parameters)"
        if network.adapters
        else "none",
        "decoder": f"two-way blocks in {network.two_way}'s form; {outputs}",
    }
    if vit:
        every = len(network.global_blocks) == sum(network.depths)
        facts["global blocks"] = "all" if every else _list(network.global_blocks)
        facts["relative positions"] = {
            "zero": "tables all zero: no bias",
            "real": "real tables",
            "none": "no tables",
        }[network.rel_pos]
    if network.sd_trans is not None:
        chunk = f"chunks of {network.depth_chunk} slices" if network.depth_chunk else "no chunks"
        exactly = f", exactly {network.slices} slices" if network.slices else ""
        facts["3D"] = f"SD-Trans, {network.sd_trans} grouping, {chunk}{exactly}"
    if network.hyp_lengths:
        facts["HyP-Adpt"] = (
            f"lengths {_list(network.hyp_lengths)}, prompt length {network.hyp_prompt_length}"
        )
    return facts


def _convention_facts(conventions: Conventions) -> dict[str, str]:
    window = conventions.intensity_window
    return {
        "preprocess": conventions.preprocess,
        "points": f"order {conventions.point_order}, frame {conventions.point_frame}"
        + ("" if conventions.point_scale == 1 else f", times {conventions.point_scale:g}")
        + (f", padded to {conventions.pad_points}" if conventions.pad_points else ""),
        "threshold": f"{conventions.threshold:g}",
        "intensity window": "none" if window is None else f"{window[0]:g}…{window[1]:g}",
        "class names": ", ".join(conventions.class_names) or "none",
    }


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"
