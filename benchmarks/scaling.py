"""Cost as work grows: image size, depth chunk, prompts in a call, threads.

    python -m benchmarks.scaling --folder DIR [--prepare]   → benchmarks/results/scaling.json, .png

Every point runs in a process of its own, the points of a curve in turn. A curve is in the JSON once
it is measured; a second start measures what is missing, or what `--only` names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.export import vit_b_checkpoint
from benchmarks.peers import files
from benchmarks.peers.candidates import Candidate, candidates
from benchmarks.peers.names import DEFAULT_NAME
from benchmarks.peers.networks import SLICES_2D, Network, demonstration, lite_med_sam
from benchmarks.peers.rounds import Running, start, worker
from benchmarks.peers.store import resumed, save
from medsa_deploy import machine
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.stages.demo.medsa import CLASSES

RESULT = Path(__file__).parent / "results" / "scaling.json"
SIZES = (256, 512, 768, 1024)
CHUNKS = (1, 2, 4, 8, 16, 32)
PROMPTS = (1, 2, 4, 8, 16, 32, 64)
FIRST_SLICE = 60
"""Of the template, where chunks begin."""
ROUNDS = 5
BLOCKS = ("blocks.0.", "blocks.1.", "blocks.2.")
"""A quarter of ViT-B: two windowed blocks and a global one of its eight and four."""
DESCRIPTIONS = {
    "image size": "encoder, a quarter of Med-SA ViT-B (three blocks, one global), seeded weights, "
    "real tables",
    "depth chunk": "encoder, the demonstration checkpoint with chunks of so many slices",
    "prompts": "click part of LiteMedSAM's decoder, so many boxes in one call",
    "threads": "encoder on so many threads",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured at one place of a curve."""

    curve: str
    line: str
    x: int
    network: Network
    threads: int | None = None
    op: str = "encoder"
    prompts: int = 1
    slices: int = 1
    """What a time is divided by."""


def quarter(size: int) -> Network:
    """A quarter of Med-SA ViT-B for images of a size."""

    def write(path: Path) -> None:
        vit_b_checkpoint(path, rel_pos_scale=0.2, grid=size // 16)
        state = {
            key: value
            for key, value in torch.load(path, weights_only=True).items()
            if ".blocks." not in key or any(block in key for block in BLOCKS)
        }
        torch.save(state, path)

    return Network(
        name=f"Quarter of ViT-B at {size}",
        checkpoint=write,
        real_weights=False,
        overrides=Overrides(image_size=size, global_blocks=(2,)),
        precisions=(),
        peers=False,
    )


def in_chunks(chunk: int) -> Network:
    """The demonstration checkpoint in 3D, in 2D for a chunk of 1."""
    classes = Overrides(classes=len(CLASSES), class_names=CLASSES)
    return Network(
        name=f"Demonstration in chunks of {chunk}",
        checkpoint=demonstration,
        real_weights=True,
        overrides=classes if chunk == 1 else replace(classes, depth_chunk=chunk),
        template=(range(FIRST_SLICE, FIRST_SLICE + chunk),),
        precisions=(),
        peers=False,
    )


LITE = Network(
    name="LiteMedSAM alone",
    checkpoint=lite_med_sam,
    real_weights=True,
    template=SLICES_2D[:1],
    precisions=(),
    peers=False,
)


def points() -> Iterator[Point]:
    """Every point of every curve."""
    for size in SIZES:
        yield Point(curve="image size", line="encoder", x=size, network=quarter(size))
    for chunk in CHUNKS:
        network = in_chunks(chunk)
        yield Point(curve="depth chunk", line="a slice", x=chunk, network=network, slices=chunk)
    for count in PROMPTS:
        common: dict[str, Any] = {"network": LITE, "op": "click", "prompts": count}
        yield Point(curve="prompts", line="one call", x=count, **common)
    for threads in range(1, machine.cores() + 1):
        for line, network in (("LiteMedSAM", LITE), ("quarter of ViT-B at 512", quarter(512))):
            yield Point(curve="threads", line=line, x=threads, network=network, threads=threads)


def default_of(point: Point, folder: Path) -> Candidate:
    """Our default on a point's network."""
    network_candidates = candidates(point.network, folder, point.threads)
    try:
        (candidate,) = (c for c in network_candidates if c.name == DEFAULT_NAME)
    except ValueError as e:
        reasons = files.failures(folder / point.network.slug)
        raise SystemExit(f"{point.network.name} is not prepared: {reasons}") from e
    return replace(candidate, ops=("decoder", "click") if point.op == "click" else (point.op,))


def measure(curve: list[Point], folder: Path, rounds: int) -> dict[str, Any]:
    """One curve, its points in turn."""
    with ExitStack() as stack:
        running: list[tuple[Point, Running]] = []
        for i, point in enumerate(curve):
            candidate = default_of(point, folder)
            process = stack.enter_context(worker(candidate.spec, folder / f"scaling-{i}.log"))
            running.append((point, start(candidate, process, prompts=point.prompts)))
        for _ in range(rounds):
            for _, running_candidate in running:
                running_candidate.take()
        lines: dict[str, list[dict[str, Any]]] = {}
        for point, running_candidate in running:
            samples = [
                ms / point.slices
                for round_ms in running_candidate.samples_ms[point.op]
                for ms in round_ms
            ]
            entry = {
                "x": point.x,
                "median_ms": median(samples),
                "peak_mb": running_candidate.process.ask("memory")["peak_mb"],
                "samples_ms": samples,
            }
            if point.op == "click":
                decoder_rounds = running_candidate.samples_ms["decoder"]
                decoder_ms = [ms for round_ms in decoder_rounds for ms in round_ms]
                entry["whole_ms"] = median(decoder_ms)  # image part and click part
            lines.setdefault(point.line, []).append(entry)
    return {"what": DESCRIPTIONS[curve[0].curve], "lines": lines}


def sentences(result: dict[str, Any]) -> list[str]:
    """What the curves say, one sentence each; of those that were measured."""
    say: dict[str, Callable[[dict[str, list[dict[str, Any]]]], str]] = {
        "image size": _sizes,
        "depth chunk": _chunks,
        "prompts": _prompts,
        "threads": _threads,
    }
    curves = result["curves"]
    return [tell(curves[name]["lines"]) for name, tell in say.items() if name in curves]


def _sizes(lines: dict[str, list[dict[str, Any]]]) -> str:
    first, *_, last = lines["encoder"]
    return (
        f"**Image size:** from {first['x']}² to {last['x']}², {(last['x'] / first['x']) ** 2:.0f} "
        f"times the pixels, an encoding takes {last['median_ms'] / first['median_ms']:.1f} times "
        f"as long and {last['peak_mb'] / first['peak_mb']:.1f} times the memory."
    )


def _chunks(lines: dict[str, list[dict[str, Any]]]) -> str:
    first, *later = lines["a slice"]
    most = max(later, key=lambda entry: entry["median_ms"])
    last = later[-1]
    return (
        f"**Depth chunk:** a slice in chunks of {last['x']} takes "
        f"{last['median_ms'] / first['median_ms']:.2f} times as long as one alone, and in none of "
        f"the sizes measured more than {most['median_ms'] / first['median_ms']:.2f} times."
    )


def _prompts(lines: dict[str, list[dict[str, Any]]]) -> str:
    first, *_, last = lines["one call"]
    whole_ms, apart = (last["x"] * first[key] for key in ("whole_ms", "median_ms"))
    return (
        f"**Prompts:** {last['x']} boxes in one call take {last['median_ms']:.0f} ms, "
        f"{last['median_ms'] / whole_ms:.2f} of as many runs of a whole decoder, image part and "
        "all. "
        f"One by one they take {apart / last['median_ms']:.2f} times as long: either way, what "
        "depends on the image alone has run before."
    )


def _threads(lines: dict[str, list[dict[str, Any]]]) -> str:
    faster = [
        f"{line} {entries[0]['median_ms'] / entries[-1]['median_ms']:.2f} times as fast as on one"
        for line, entries in lines.items()
    ]
    count = next(iter(lines.values()))[-1]["x"]
    return f"**Threads:** on {count}, encoding with {' and '.join(faster)}."


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each curve: medians as a line, every sample a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = result["curves"]
    figure, axes = plt.subplots(1, len(curves), figsize=(3.4 * len(curves), 3.2), squeeze=False)
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=True):
        for line, entries in curve["lines"].items():
            xs = [entry["x"] for entry in entries]
            axis.plot(xs, [entry["median_ms"] for entry in entries], "-", label=line)
            for entry in entries:
                samples = entry["samples_ms"]
                axis.plot([entry["x"]] * len(samples), samples, ".", color="black", markersize=2)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms")
        axis.set_xticks(xs, [str(x) for x in xs], fontsize=7)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=7)
        axis.legend(fontsize=7)
    figure.suptitle(result["machine"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Prepare, measure curve by curve, draw."""
    parser = argparse.ArgumentParser(description="Cost as work grows.")
    parser.add_argument("--folder", type=Path, required=True, help="for files, kept between runs")
    parser.add_argument("--prepare", action="store_true", help="make files, measure nothing")
    parser.add_argument("--only", metavar="REGEX", help="curves to measure, again too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    folder = args.folder.resolve()
    chosen = [p for p in points() if re.search(args.only or "", p.curve)]
    for network in {p.network.name: p.network for p in chosen}.values():
        files.prepare(network, folder, again=args.prepare)
    if args.prepare:
        return
    result = resumed(args.result, {"curves": {}}, None)
    for name in dict.fromkeys(p.curve for p in chosen):
        if name in result["curves"] and not args.only:
            continue
        files.say(f"{name}: measure")
        curve = [p for p in chosen if p.curve == name]
        result["curves"][name] = measure(curve, folder, args.rounds)
        save(result, args.result)
    draw(result, args.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
