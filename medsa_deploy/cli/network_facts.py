"""A network's facts and conventions → a table; inspect and export print the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from medsa_deploy.bundle.manifest import Conventions, Network, PostprocessingName

from .console import out, plain_table, print_facts

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Guess


def print_network(network: Network, conventions: Conventions) -> None:
    """A network's architecture, then how images and prompts reach it."""
    scope = {"prompts": f"for their {conventions.prompt_scope}"} if network.chunk > 1 else {}
    facts = (
        _encoder_facts(network, conventions)
        | _depth_facts(network)
        | _convention_facts(conventions)
    )
    print_facts(facts | scope)


def print_guesses(guesses: Sequence[Guess]) -> None:
    """The facts that the checkpoint does not determine, with the options that set them."""
    if not guesses:
        return
    out.print("\nThe checkpoint does not determine these; an option sets each:")
    table = plain_table()
    for guess in guesses:
        table.add_row(
            guess.fact, f"[bold]{escape(guess.value)}[/]", escape(guess.because), guess.option
        )
    out.print(table)


def _encoder_facts(network: Network, conventions: Conventions) -> dict[str, str]:
    from medsa_deploy.exporters.families.registry import label_tokens, title_of

    share = 100 * network.adapter_parameters / network.parameters
    one_stage_attends = len(network.heads) == 1 and network.heads[0] > 0
    window = network.windows[0] if one_stage_attends else 0
    windows = f", windows of {window}" if window else ""
    first = "mask 0" if conventions.mask_choice == "first" else "the best of 1…"
    outputs = {
        "classes": f"{network.classes} class(es), masks 0…{network.classes - 1}",
        "labels": f"{network.classes} class(es) and a background, which exclude each other: mask "
        f"tokens {label_tokens(network)}",
        "sam": f"{network.mask_tokens} mask tokens: {first}, or 1… with multimask",
    }[network.outputs]
    facts = {
        "network": title_of(network),
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
    if one_stage_attends:
        all_global = len(network.global_blocks) == sum(network.depths)
        facts["global blocks"] = "all" if all_global else _list(network.global_blocks)
        facts["relative positions"] = {
            "zero": "tables all zero: no bias",
            "real": "real tables",
            "none": "no tables",
        }[network.rel_pos]
    return facts


def _depth_facts(network: Network) -> dict[str, str]:
    facts = {}
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
        "trained with": conventions.trained_with or "unknown",
        "preprocess": conventions.preprocess,
        "masks": _mask_facts(conventions),
        "prompts": {
            "required": "required",
            "optional": "with or without",
            "none": "none: it segments without a click",
        }[conventions.prompts],
        "points": f"order {conventions.point_order}, frame {conventions.point_frame}"
        + ("" if conventions.point_scale == 1 else f", times {conventions.point_scale:g}")
        + (f", padded to {conventions.pad_points}" if conventions.pad_points else ""),
        "threshold": f"{conventions.threshold:g}",
        "intensity window": "none" if window is None else f"{window[0]:g}…{window[1]:g}",
        "class names": ", ".join(conventions.class_names) or "none",
    }


def _mask_facts(conventions: Conventions) -> str:
    """How masks are made of logits."""
    ways: dict[PostprocessingName, str] = {
        "sam": "logits, bilinear to the network's frame, then to the image",
        "medsam": "probabilities, bilinear to the image",
        "efficientsam": "logits, bicubic to the image, the threshold included",
        "finetune-sam": "logits, nearest to the image",
        "samed": "logits, bilinear to the network's frame, nearest to the image",
    }
    return f"{conventions.postprocess} ({ways[conventions.postprocess]})"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"
