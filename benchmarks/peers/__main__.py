"""The command line of this package; see its docstring."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import files
from .candidates import SWIN_SLUG, Candidate, candidates, swin_candidates
from .files import say
from .names import DEFAULT_NAME, SWIN
from .networks import NETWORKS, PAIRS, Network
from .plot import draw
from .rounds import Limits, WorkerError, measure, ratio, start, worker
from .store import resumed, save
from .targets import Result

RESULT = Path(__file__).parents[1] / "results" / "peers.json"
PAIR_ROUNDS = 5
PAIR_REPEATS = 3


SWIN_LIMITS = Limits(rounds=3, need_gb=4.0)
DESCRIPTION = (
    "Milliseconds of an encoding, of the first prompt of an image (decoder) and of the next one "
    "(click), each candidate in a process of its own, candidates of a group in turn; ratios are "
    "medians over rounds of a candidate's time over the plain export's in ONNX Runtime in the same "
    "round; peak memory is the whole process's; agreement is with the float32 reference network"
)


def measure_network(
    name: str,
    transforms: Sequence[Candidate],
    place: Path,
    result: Result,
    args: argparse.Namespace,
    limits: Limits,
) -> None:
    """Measure what is missing of a network, or what `--only` names, group by group."""
    costs = place / "costs.json"
    if not transforms or not costs.exists():
        say(f"{name}: not prepared: {files.failures(place)}")
        return
    limits = replace(limits, rounds=args.rounds or limits.rounds, threads=args.threads)
    empty = {"gflop": json.loads(costs.read_text()), "groups": {}, "candidates": {}}
    entry = result["networks"].setdefault(name, empty)
    todo = [c for c in transforms if _to_measure(f"{name}/{c.name}", entry, c, args.only)]
    for candidate in [c for c in todo if c.missing]:
        entry["candidates"][candidate.name] = {"not_measured": candidate.missing}
    todo = [c for c in todo if not c.missing]
    renewed = {c.name for c in todo}
    reference = next((c for c in transforms if not c.missing), None)
    (place / "logs").mkdir(exist_ok=True)
    while todo and reference is not None:
        say(f"{name}: {len(todo)} to measure")
        try:
            group = measure(todo, reference, limits, place / "logs")
        except WorkerError as e:
            say(f"{name}: {reference.name}, which ratios are to: {e}")
            return
        number = str(1 + max(map(int, entry["groups"]), default=0))
        entry["groups"][number] = group.facts
        for measured, figures in group.figures.items():
            if measured in renewed:  # the reference's figures are of its first group
                entry["candidates"][measured] = figures | {"group": number}
                renewed.discard(measured)
        todo = group.unmeasured
        save(result, args.result)


def _to_measure(label: str, entry: dict[str, Any], candidate: Candidate, only: str | None) -> bool:
    """Whether to measure a candidate now."""
    if only:
        return re.search(only, label) is not None
    return "median_ms" not in entry["candidates"].get(candidate.name, {})


def measure_pair(
    network: Network, base: Network, folder: Path, result: Result, args: argparse.Namespace
) -> None:
    """Our default's encoder on two networks in turn: what the first costs over the second."""
    name = f"{network.name} / {base.name}"
    done = name in result["pairs"]
    if (re.search(args.only, name) is None) if args.only else done:
        return
    chosen = [
        next((c for c in candidates(n, folder, args.threads) if c.name == DEFAULT_NAME), None)
        for n in (network, base)
    ]
    if None in chosen:
        say(f"{name}: not prepared")
        return
    say(f"{name}: in turn")
    logs = folder / network.slug / "logs"
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        running = []
        for i, candidate in enumerate(filter(None, chosen)):
            process = stack.enter_context(worker(candidate.spec, logs / f"pair-{i}.log"))
            running.append(start(candidate, process, PAIR_REPEATS))
        for _ in range(args.rounds or PAIR_ROUNDS):
            for each in running:
                each.take()
    first, second = (each.samples_ms["encoder"] for each in running)
    slices = [n.overrides.depth_chunk or 1 for n in (network, base)]
    result["pairs"][name] = {
        "what": f"{DEFAULT_NAME}: encoder of the first over the second, for each slice",
        "ratio": ratio(first, second) * slices[1] / slices[0],
        "slices": slices,
        "samples_ms": [first, second],
    }
    save(result, args.result)


def main() -> None:
    """Prepare, measure, draw."""
    parser = argparse.ArgumentParser(description="Our graphs beside what users would pick instead.")
    parser.add_argument("--folder", type=Path, required=True, help="for files, kept between runs")
    parser.add_argument("--prepare", action="store_true", help="make files, measure nothing")
    parser.add_argument("--network", metavar="REGEX", default="", help="networks to consider")
    parser.add_argument("--only", metavar="REGEX", help="NETWORK/CANDIDATE to measure, again too")
    parser.add_argument("--rounds", type=int, help="of every group")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    folder = args.folder.resolve()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    networks = [n for n in NETWORKS if re.search(args.network, n.name)]
    with_swin = re.search(args.network, SWIN) is not None
    for network in networks:
        files.prepare(network, folder, again=args.prepare)
    if with_swin:
        files.prepare_swin(folder / SWIN_SLUG, again=args.prepare)
    if args.prepare:
        return
    empty: Result = {"what": DESCRIPTION, "networks": {}, "pairs": {}}
    result = resumed(args.result, empty, args.threads)
    for network in networks:
        if network.peers:
            measured = candidates(network, folder, args.threads)
            limits = Limits(rounds=network.rounds, need_gb=network.need_gb)
            measure_network(network.name, measured, folder / network.slug, result, args, limits)
    if with_swin:
        swin = swin_candidates(folder, args.threads)
        measure_network(SWIN, swin, folder / SWIN_SLUG, result, args, SWIN_LIMITS)
    by_name = {network.name: network for network in networks}
    for first, second in PAIRS:
        if first in by_name and second in by_name:
            measure_pair(by_name[first], by_name[second], folder, result, args)
    draw(result, args.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
