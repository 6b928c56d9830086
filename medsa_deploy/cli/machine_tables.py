"""What doctor and demo found, in words."""

from __future__ import annotations

from rich.markup import escape

from medsa_deploy.stages import Demonstration, Diagnosis, LiteMedSAMDemonstration, Tuning

from .console import out, plain_table, print_error, print_facts
from .parity_table import print_parity


def print_diagnosis(found: Diagnosis) -> None:
    """What this machine has."""
    memory = "" if found.memory_gb is None else f", {found.memory_gb:g} GB"
    print_facts(
        {
            "medsa-deploy": found.medsa_deploy,
            "Python": f"{found.python} on {found.system}",
            "processor": f"{found.processor}, {found.cores} cores{memory}",
            "ONNX Runtime": ", ".join(found.providers) or "not usable",
            "NVIDIA driver": "found" if found.nvidia_driver else "not found",
        }
    )
    for choice in found.tuning:
        out.print(
            f"[bold]auto[/] for {escape(choice.bundle)} is {choice.backend} with "
            f"{choice.threads or 'all'} thread(s): {choice.first_click_ms:.0f} ms "
            f"a first click on {choice.measured}"
        )
    for extra, libraries in found.libraries.items():
        missing = [name for name, version in libraries.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in libraries.items() if version)
        hint = "" if extra == "runtime" else f": pip install 'medsa-deploy[{extra}]'"
        out.print(f"[bold]{extra}[/]  {there or 'nothing installed'}")
        if missing:
            out.print(escape(f"    missing {', '.join(missing)}{hint}"), style="yellow")
    for problem in found.problems:
        print_error(problem)


def print_tuning(found: Tuning) -> None:
    """Backends and threads, measured."""
    table = plain_table("backend", "threads", "first click")
    for candidate in found.candidates:
        chosen = (candidate.backend, candidate.threads) == (
            found.choice.backend,
            found.choice.threads,
        )
        mark = "  [bold green]auto[/]" if chosen else ""
        table.add_row(
            candidate.backend,
            str(candidate.threads or "all"),
            f"{candidate.first_click_ms:.1f} ms{mark}",
        )
    out.print(table)
    out.print(
        "medians, ONNX Runtime with all cores unless another is clearly faster; "
        f"stored in {escape(str(found.stored_in))}"
    )


def print_demonstration(found: Demonstration) -> None:
    """What the demonstration measured."""
    print_parity(found.parity, "the checkpoint's own network")
    clicks = ", ".join(f"({x:g}, {y:g}, {z:g})" for x, y, z in found.clicks)
    out.print(
        "\nA small Med-SA (HyP-Adpt, SD-Trans) on slices of the MNI T1 template (an average of 152 "
        f"heads)\nthat it was not trained on, from {len(found.clicks)} clicks at {clicks}:"
    )
    table = plain_table("structure", "Dice")
    for name, dice in found.dice.items():
        table.add_row(name, f"{dice:.3f}")
    out.print(table)
    times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.timings_ms.items())
    out.print(f"{times} a slice (medians, ONNX Runtime on this CPU)")
    out.print(f"bundle       {escape(str(found.bundle))}")
    out.print(f"segmentation {escape(str(found.segmentation))}")
    out.print(f"montage      {escape(str(found.montage))}")


def print_litemedsam(found: LiteMedSAMDemonstration) -> None:
    """What the demonstration with LiteMedSAM measured, on slices of the MNI T1 template."""
    print_parity(found.parity, "LiteMedSAM's own network")
    table = plain_table("slice", "structure", "prompt", "Dice")
    for result in found.results:
        table.add_row(str(result.slice), result.structure, result.prompt, f"{result.dice:.3f}")
    out.print(table)
    out.print(
        f"encode {found.encode_ms:.0f} ms an image, then {found.prompt_ms:.0f} ms a prompt "
        "(medians, ONNX Runtime on this CPU)"
    )
    out.print(f"bundle  {escape(str(found.bundle))}")
    out.print(f"overlay {escape(str(found.overlay))}")
