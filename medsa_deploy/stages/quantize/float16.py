"""A bundle's float32 graphs → float16 graphs with masks that agree.

Three things keep a node in float32: its operator (norms, softmax, coordinates), values on the
verification cases that float16 cannot hold, and its block, if the masks would differ too much. For
this decision, graphs round every result to float16, like a GPU. ONNX Runtime on a CPU computes
float16 graphs in float32 between operators and would hide both rounding and overflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Parity, Role
from medsa_deploy.bundle.node_names import block_of, module_of
from medsa_deploy.bundle.recipe import Island, Recipe
from medsa_deploy.errors import ParityError
from medsa_deploy.evaluation.parity import require_parity, run_case
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.float16 import Change, round_like_float16, to_float16
from medsa_deploy.graph.float32_nodes import float32_nodes
from medsa_deploy.graph.ranges import HIGH, LOW, computed_values, watch
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import Session

from .candidates import CandidateResult, CandidateRunner, RecordingBackend

GRAPHS: tuple[Role, Role] = ("encoder", "decoder")
PRECISION = "fp16"

Ranges = dict[str, dict[str, float]]
"""Graph → value → largest magnitude."""


@dataclass(frozen=True, kw_only=True)
class QuantizedGraphs:
    """A precision's graphs, not yet in the bundle."""

    graphs: dict[Role, list[Path]]
    """`encoder`, and other roles with new graphs → files, the graph first."""
    decoder_of: str | None = None
    """The precision that this one shares its decoder with."""
    recipe: Recipe
    parity: Parity


def make_float16(runner: CandidateRunner, folder: Path, on_step: OnStep) -> QuantizedGraphs:
    """Float16 graphs in `folder`; ParityError if no combination of nodes agrees with float32."""
    on_step("measure the values of the float32 graphs")
    ranges = largest_values(runner, folder)
    on_step("run with every result rounded to float16")
    rounded = _measure(runner, folder, ranges, ())
    blocks: tuple[str, ...] = ()
    if rounded.failures:
        on_step("measure what each block costs")
        order = _costly_blocks(runner, folder, ranges)
        while rounded.failures and len(blocks) < len(order):
            blocks = order[: len(blocks) + 1]
            on_step(f"return {blocks[-1]} to float32")
            rounded = _measure(runner, folder, ranges, blocks)
    on_step("run the float16 graphs in onnxruntime")
    files: dict[Role, list[Path]] = {}
    reasons: list[str] = []
    for name in GRAPHS:
        model = load_graph(getattr(runner, name))
        float32 = float32_nodes(model, blocks=of_graph(name, blocks), ranges=ranges[name])
        change = to_float16(model, float32)
        require_changed(name, change)
        reasons += float32.values()
        files[name] = save_graph(model, folder / f"{name}.{PRECISION}.onnx")
    parity = runner.measure(files["encoder"][0], files["decoder"][0], PRECISION).parity
    require_parity(parity)
    dice = rounded.parity
    recipe = Recipe(
        precision=PRECISION,
        islands=counted(reasons),
        float32_blocks=blocks,
        rounded_dice_mean=dice.mask_dice_mean,
        rounded_dice_worst=dice.mask_dice_worst,
        runs=runner.runs,
    )
    return QuantizedGraphs(graphs=files, recipe=recipe, parity=parity)


def largest_values(runner: CandidateRunner, folder: Path) -> Ranges:
    """Largest magnitude of every value that the float32 graphs compute, over the cases."""
    ranges: Ranges = {name: {} for name in GRAPHS}
    paths = {}
    for name in GRAPHS:
        model = load_graph(getattr(runner, name))
        watch(model, computed_values(model))
        paths[name] = save_graph(model, folder / f"{name}.watched.onnx")[0]

    def watcher(name: str) -> Any:
        def note(output: str, value: Any) -> None:
            key, magnitude = output.removesuffix(LOW).removesuffix(HIGH), abs(float(value))
            # a value without elements, such as prompts that there are none of, has no range
            empty = float(value) == (np.inf if output.endswith(LOW) else -np.inf)
            ranges[name][key] = max(ranges[name].get(key, 0.0), 0.0 if empty else magnitude)

        return note

    backend = RecordingBackend(
        paths["encoder"],
        paths["decoder"],
        runner.manifest,
        {name: watcher(name) for name in GRAPHS},
        runner.threads,
    )
    with Session(runner.manifest, backend) as session:
        for case in runner.cases:
            run_case(session, case)
    return ranges


def counted(reasons: Iterable[str]) -> tuple[Island, ...]:
    """The reasons of single nodes, as the manifest has them."""
    return tuple(Island(reason=r, nodes=n) for r, n in sorted(Counter(reasons).items()))


def require_changed(name: str, change: Change) -> None:
    """ParityError if a pass could not convert a graph."""
    if not change.changed:
        raise ParityError(f"the {name} cannot be converted ({change.description}): use fp32")


def _measure(
    runner: CandidateRunner, folder: Path, ranges: Ranges, blocks: tuple[str, ...]
) -> CandidateResult:
    """Compare masks when all nodes round to float16, except float32 nodes and `blocks`."""
    paths = {
        name: _rounded(runner, folder, name, of_graph(name, blocks), ranges[name])
        for name in GRAPHS
    }
    return runner.measure(paths["encoder"], paths["decoder"], PRECISION)


def _costly_blocks(runner: CandidateRunner, folder: Path, ranges: Ranges) -> tuple[str, ...]:
    """Every block by its cost when it alone rounds to float16, the most costly first."""
    costs = {}
    for name in GRAPHS:
        nodes = load_graph(getattr(runner, name)).graph.node
        blocks = dict.fromkeys(block_of(module_of(node)) for node in nodes)
        for block in blocks:
            float32_blocks = tuple(other for other in blocks if other != block)
            path = _rounded(runner, folder, name, float32_blocks, ranges[name])
            pair = {graph: getattr(runner, graph) for graph in GRAPHS} | {name: path}
            costs[f"{name} {block}"] = cost(runner.measure(**pair, precision=PRECISION).parity)
    return tuple(sorted(costs, key=lambda block: costs[block], reverse=True))


def cost(parity: Parity) -> tuple[float, float, float]:
    """Distance of masks from float32's, to sort by: NaN, then Dice, then logits."""
    lost = 1 - (parity.mask_dice_mean or 0.0)
    return float(parity.nan_count), lost, parity.tensors["low_res_masks"].relative_l2


def _rounded(
    runner: CandidateRunner,
    folder: Path,
    name: str,
    blocks: tuple[str, ...],
    ranges: Mapping[str, float],
) -> Path:
    model = load_graph(getattr(runner, name))
    round_like_float16(model, float32_nodes(model, blocks=blocks, ranges=ranges))
    return save_graph(model, folder / f"{name}.rounded.onnx")[0]


def of_graph(name: str, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks of one graph, without its name."""
    return tuple(b.removeprefix(f"{name} ") for b in blocks if b.startswith(f"{name} "))
