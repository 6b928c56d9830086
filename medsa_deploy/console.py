"""Results → text for a terminal, or JSON for a program; errors and signals → a line, an exit code.

Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .errors import MedsaError
from .manifest import Conventions, Network, Parity
from .stages import (
    Demonstration,
    Diagnosis,
    Export,
    Inspection,
    LiteMedSAMDemonstration,
    Segmentation,
    Verification,
    VolumeSegmentation,
)

if TYPE_CHECKING:
    from .exporters.lora import LoRA

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

FAMILIES = {
    "medsa": "Med-SA",
    "sam": "SAM",
    "litemedsam": "LiteMedSAM",
    "mobile_sam": "mobile_sam",
    "efficient_sam": "efficient_sam",
}
ENCODERS = {"vit": "ViT", "tiny_vit": "TinyViT"}


class WarningLines(logging.Handler):
    """Log records as single lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        err.print(f"[yellow]{record.levelname.lower()}:[/] {escape(record.getMessage())}")


def prepare() -> None:
    """Send the package's warnings to stderr; let no character end a command it cannot print in."""
    logger = logging.getLogger("medsa_deploy")
    logger.handlers = [h for h in logger.handlers if not isinstance(h, WarningLines)]
    logger.addHandler(WarningLines())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def catch_interrupts() -> list[float]:
    """Make a polite kill end like Ctrl-C; the list fills with the times of interrupts.

    Repeats within a second are ignored: Ctrl-C is often pressed twice, and cleaning up must end.
    """
    times: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not times or monotonic() - times[-1] > 1:
            times.append(monotonic())
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # what a parent ignores (nohup, a shell's background job) stays ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return times


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(result, default=_plain, indent=2))


def print_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")


def print_failure(error: BaseException) -> int:
    """What ended a command, as one line; its exit code."""
    if isinstance(error, MedsaError):
        print_error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        print_error(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 2
    if isinstance(error, MemoryError):
        print_error("out of memory: use a smaller image size or fewer prompts at a time")
        return 3
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    print_error(f"{what} (a fault in medsa-deploy; --debug shows where)")
    return 3


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Names of steps as they begin, with the seconds each took; a spinner where it can be seen."""
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, begun = started[-1]
            err.print(f"  {escape(name)} [dim]{perf_counter() - begun:.1f} s[/]")

    with err.status("") as status:

        def begin(name: str) -> None:
            finish()
            started.append((name, perf_counter()))
            status.update(f"{escape(name)} …")

        yield begin
        finish()


@contextmanager
def progress(shown: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of things done, with the time left; nothing where it cannot be seen."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(
        *columns, console=err, transient=True, disable=not (shown and err.is_terminal)
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_inspection(found: Inspection) -> None:
    """What a checkpoint is."""
    source = found.source
    over = f" over {source.base}" if source.base else ""
    out.print(f"[bold]{escape(source.checkpoint)}[/]  {source.container}{over}, {source.dtype}")
    _print_facts(_facts(found.network, found.conventions))
    if found.lora:
        out.print("\nLow-rank updates, merged into:")
        table = _table()
        for (linear, kind, rank), count in Counter(map(_alike, found.lora)).items():
            table.add_row(f"{count}×", escape(linear), kind, f"rank {rank}")
        out.print(table)
    print_guesses(found.guesses)


def print_guesses(guesses: Sequence[Any]) -> None:
    """Facts the checkpoint does not settle, and the options that overrule them."""
    if not guesses:
        return
    out.print("\nNot settled by the checkpoint; an option overrules each:")
    table = _table()
    for guess in guesses:
        table.add_row(
            guess.fact, f"[bold]{escape(guess.value)}[/]", escape(guess.because), guess.option
        )
    out.print(table)


def print_export(made: Export) -> None:
    """A bundle that was just made."""
    network = made.manifest.network
    out.print(f"[bold green]{escape(str(made.bundle))}[/]  in {made.seconds:.0f} s")
    _print_facts(_facts(network, made.manifest.conventions))
    print_guesses(made.guesses)
    _print_files([(f.path, f.bytes) for f in made.manifest.files])
    for parity in made.manifest.parity:
        _print_parity(parity, "the checkpoint's own network")


def print_verification(found: Verification) -> None:
    """How a bundle compares."""
    against = {
        "checkpoint": "the checkpoint's own network",
        "saved reference": "what the checkpoint's own network gave at export",
    }[found.against]
    for parity in found.parity:
        _print_parity(parity, against)
    if found.failures:
        for failure in found.failures:
            print_error(failure)
    else:
        out.print("[bold green]verified[/]")


def print_segmentation(result: Segmentation) -> None:
    """What came of one image."""
    if result.error is not None:
        print_error(result.error)
        return
    assert result.pixels is not None
    assert result.timings_ms is not None
    masks = ", ".join(f"{name} {count} px" for name, count in result.pixels.items())
    scores = ", ".join(f"{score:.3f}" for row in result.scores for score in row)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.timings_ms.items())
    out.print(f"[bold]{escape(str(result.image))}[/]  {escape(masks)}  predicted IoU {scores}")
    out.print(f"  {times}", style="dim")
    for path in (result.mask, result.overlay, result.logits):
        if path is not None:
            out.print(f"  → {escape(str(path))}")


def print_volume(result: VolumeSegmentation) -> None:
    """What came of one volume."""
    shape = "×".join(map(str, result.shape))
    total = result.shape[result.axis]
    out.print(
        f"[bold]{escape(str(result.volume))}[/]  {shape} voxels, {len(result.slices)} of {total} "
        f"slices along axis {result.axis} segmented in {result.seconds:.1f} s"
    )
    table = _table("label", "name", "voxels", "ml")
    for label in result.labels:
        volume = "" if label.millilitres is None else f"{label.millilitres:.2f}"
        table.add_row(str(label.label), escape(label.name), str(label.voxels), volume)
    out.print(table)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.timings_ms.items())
    window = result.intensity_window
    shown = "" if window is None else f"; intensities {window[0]:g}…{window[1]:g}"
    out.print(f"  {times} a slice (medians){shown}", style="dim")
    for path in (result.mask, result.overlay):
        if path is not None:
            out.print(f"  → {escape(str(path))}")


def print_diagnosis(found: Diagnosis) -> None:
    """What this machine has."""
    memory = "" if found.memory_gb is None else f", {found.memory_gb:g} GB"
    _print_facts(
        {
            "medsa-deploy": found.medsa_deploy,
            "Python": f"{found.python} on {found.system}",
            "processor": f"{found.processor}, {found.cores} cores{memory}",
            "ONNX Runtime": ", ".join(found.providers) or "not usable",
            "NVIDIA driver": "found" if found.nvidia_driver else "not found",
        }
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


def print_demonstration(found: Demonstration) -> None:
    """What the demonstration measured."""
    _print_parity(found.parity, "the checkpoint's own network")
    clicks = ", ".join(f"({x:g}, {y:g}, {z:g})" for x, y, z in found.clicks)
    out.print(
        "\nA small Med-SA (HyP-Adpt, SD-Trans) on slices of the MNI T1 template (an average of 152 "
        f"heads)\nthat it was not trained on, from {len(found.clicks)} clicks at {clicks}:"
    )
    table = _table("structure", "Dice")
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
    _print_parity(found.parity, "LiteMedSAM's own network")
    table = _table("slice", "structure", "prompt", "Dice")
    for result in found.results:
        table.add_row(str(result.slice), result.structure, result.prompt, f"{result.dice:.3f}")
    out.print(table)
    out.print(
        f"encode {found.encode_ms:.0f} ms an image, then {found.prompt_ms:.0f} ms a prompt "
        "(medians, ONNX Runtime on this CPU)"
    )
    out.print(f"bundle  {escape(str(found.bundle))}")
    out.print(f"overlay {escape(str(found.overlay))}")


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


def _print_parity(parity: Parity, against: str) -> None:
    images = f"{parity.images} image(s), " if parity.images else ""
    out.print(
        f"\n{parity.precision} in {parity.backend} against {against}, worst of {images}"
        f"{parity.seeded_images} seeded image(s), {parity.prompt_sets} prompt sets:"
    )
    table = _table("tensor", "relative L2", "max abs")
    for name, tensor in parity.tensors.items():
        table.add_row(name, f"{tensor.relative_l2:.1e}", f"{tensor.max_abs:.1e}")
    table.add_row("mask pixels differing", f"{parity.mask_pixels_differing:.1e}", "")
    out.print(table)


def _print_files(files: Sequence[tuple[str, int]]) -> None:
    out.print()
    table = _table()
    for path, size in files:
        table.add_row(path, f"{size / 1e6:.1f} MB")
    out.print(table)


def _print_facts(facts: dict[str, str]) -> None:
    table = _table()
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    out.print(table)


def _table(*headers: str) -> Table:
    table = Table(*headers, box=None, show_header=bool(headers), pad_edge=False, header_style="dim")
    if not headers:
        table.padding = (0, 2, 0, 0)
    return table


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _plain(value: Any) -> Any:
    """What json does not know: dataclasses and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
