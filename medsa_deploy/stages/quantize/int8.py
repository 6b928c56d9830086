"""A bundle's float32 encoder and a user's images → an encoder with INT8 linear layers.

The masks decide the range of the codes and the layers that are left out. The decoder is small and
is not quantized: float16 for TensorRT, float32 for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from medsa_deploy.bundle.manifest import Parity, Role
from medsa_deploy.bundle.recipe import Recipe
from medsa_deploy.errors import ParityError
from medsa_deploy.evaluation.parity import parity_failures
from medsa_deploy.graph.backend_encoders import write_backend_encoders
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.float16 import round_like_float16, to_float16
from medsa_deploy.graph.float32_nodes import float32_nodes
from medsa_deploy.graph.qdq import LinearLayer, linear_layers, quantize_layers
from medsa_deploy.progress import OnStep

from . import calibration
from .calibration import ImageSource, Measured
from .candidates import CandidateResult, CandidateRunner
from .float16 import QuantizedGraphs, cost, counted, of_graph, require_changed

PERCENTS = (None, 99.99, 99.9)
"""Ranges of codes: up to the extremes, or up to a percentile of magnitudes. Each is tried once."""
STEPS = 8
"""Layers are left out in at most this number of steps, until the masks agree."""
LEAST_LOSS = 1e-6
"""Smaller losses count as this one."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The graphs that an INT8 encoder is combined with."""

    precision: Literal["fp16", "fp32"]
    """The precision of the decoder, and of everything that is not quantized."""
    decoder: Path
    float32_blocks: tuple[str, ...] = ()
    """Blocks that float16 graphs keep in float32."""


@dataclass(frozen=True, kw_only=True)
class MeasuredEncoder:
    """An INT8 encoder's files, and the comparison of its masks with float32's."""

    graphs: dict[Role, list[Path]]
    """`encoder`, and roles of encoders for one backend → files, the graph first."""
    float32_nodes: dict[int, str]
    """Index of each node that stays float32 → the reason."""
    parity: Parity
    failures: tuple[str, ...]
    """Figures beyond the limits of the precision."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers of an INT8 encoder whose masks agree with float32's."""

    encoder: MeasuredEncoder
    candidate: CandidateResult
    """The same layers, with float16 rounding."""
    layers: Sequence[LinearLayer]
    left_out: Sequence[LinearLayer]


class Search:
    """INT8 encoders of one network, from the same measured ranges."""

    def __init__(
        self, runner: CandidateRunner, folder: Path, base: Base, measured: Measured
    ) -> None:
        self.runner, self.folder, self.base, self.measured = runner, folder, base, measured
        self.percent: float | None = None
        self.half = base.precision == "fp16"
        self.precision = "int8" if self.half else "int8-cpu"
        model = load_graph(runner.encoder)
        float32 = self._float32_nodes(model)
        self.layers = [layer for layer in linear_layers(model) if layer.node not in float32]

    def candidate(self, layers: Sequence[LinearLayer]) -> CandidateResult:
        """Compare masks with `layers` in INT8; float16 nodes round like float16."""
        model = self.quantized(layers)
        if self.half:
            round_like_float16(model, self._float32_nodes(model))
        encoder = save_graph(model, self.folder / "encoder.trial.onnx")[0]
        return self.runner.measure(encoder, self.base.decoder, self.precision)

    def quantized(self, layers: Sequence[LinearLayer]) -> Any:
        """The float32 graph with Q/DQ on `layers`."""
        model = load_graph(self.runner.encoder)
        ranges = self.measured.ranges(self.percent)
        change = quantize_layers(model, layers, ranges, unsigned=not self.half)
        require_changed("encoder", change)
        return model

    def write(self, layers: Sequence[LinearLayer]) -> tuple[list[Path], dict[int, str]]:
        """The files of the encoder with `layers` in INT8, and its float32 nodes."""
        model = self.quantized(layers)
        float32 = self._float32_nodes(model)
        if self.half:
            require_changed("encoder", to_float16(model, float32))
        return save_graph(model, self.folder / f"encoder.{self.precision}.onnx"), float32

    def measured_encoder(self, layers: Sequence[LinearLayer]) -> MeasuredEncoder:
        """The encoder with `layers` in INT8, run by ONNX Runtime, and those for one backend."""
        files, float32 = self.write(sorted(layers, key=lambda layer: layer.node))
        parity = self.runner.measure(files[0], self.base.decoder, self.precision).parity
        graphs: dict[Role, list[Path]] = {"encoder": files}
        for role, path in ({} if self.half else write_backend_encoders(files)).items():
            other = self.runner.measure(path, self.base.decoder, self.precision)
            parity = replace(parity, encoders={**parity.encoders, role: other.parity})
            graphs[role] = [path]
        return MeasuredEncoder(
            graphs=graphs,
            float32_nodes=float32,
            parity=parity,
            failures=tuple(parity_failures(parity)),
        )

    def choose_reach(self) -> CandidateResult:
        """Set the range of codes that gives the best masks with every layer in INT8."""
        candidates: list[tuple[tuple[float, float, float], int, float | None, CandidateResult]] = []
        for percent in PERCENTS:
            self.percent = percent
            candidate = self.candidate(self.layers)
            candidates.append((cost(candidate.parity), len(candidates), percent, candidate))
        _, _, self.percent, best = min(candidates)
        return best

    def most_costly_first(self) -> list[LinearLayer]:
        """The layers by their cost: the cost of their kind times the cost of their block.

        Each kind alone and each block alone is quantized and measured. That takes one run for each
        kind and block; measuring single layers would take one for each pair.
        """
        kinds = {kind: self._loss("kind", kind) for kind in {x.kind for x in self.layers}}
        blocks = {block: self._loss("block", block) for block in {x.block for x in self.layers}}
        return sorted(self.layers, key=lambda x: kinds[x.kind] * blocks[x.block], reverse=True)

    def _loss(self, group: Literal["kind", "block"], name: str) -> float:
        candidate = self.candidate(
            [layer for layer in self.layers if getattr(layer, group) == name]
        )
        return max(1 - (candidate.parity.mask_dice_mean or 0.0), LEAST_LOSS)

    def _float32_nodes(self, model: Any) -> dict[int, str]:
        """Nodes that stay float32 when the graph becomes float16; empty for the CPU."""
        if not self.half:
            return {}
        blocks = of_graph("encoder", self.base.float32_blocks)
        return float32_nodes(model, blocks=blocks, ranges=self.measured.largest())


def make_int8(
    runner: CandidateRunner,
    reference: CandidateRunner,
    folder: Path,
    base: Base,
    sources: Sequence[ImageSource],
    on_step: OnStep,
    on_image: Callable[[int, int], None],
) -> QuantizedGraphs:
    """An INT8 encoder in `folder`; ParityError if no choice of layers agrees with float32.

    `runner` has the user's images as its cases, `reference` the saved reference's.
    The search runs the verification cases at most len(PERCENTS) + kinds + blocks + STEPS times.
    """
    on_step("measure the activations of your images")
    inputs = {layer.input for layer in linear_layers(load_graph(runner.encoder))}
    measured = calibration.measure(runner, folder, sources, inputs, on_image)
    search = Search(runner, folder, base, measured)
    choice = _choose_layers(search, on_step)
    encoder, rounded = choice.encoder, choice.candidate.parity
    graph = encoder.graphs["encoder"][0]
    on_reference = reference.measure(graph, base.decoder, search.precision)
    recipe = Recipe(
        precision=search.precision,
        target="tensorrt" if search.half else "cpu",
        islands=counted(encoder.float32_nodes.values()),
        float32_blocks=base.float32_blocks,
        rounded_dice_mean=rounded.mask_dice_mean if search.half else None,
        rounded_dice_worst=rounded.mask_dice_worst if search.half else None,
        quantized=tuple(x.name for x in sorted(choice.layers, key=lambda layer: layer.node)),
        left_out=tuple(layer.name for layer in choice.left_out),
        weights="int8, symmetric, per channel",
        activations="int8, symmetric" if search.half else "uint8",
        calibration=calibration.described(
            sources,
            runner.manifest.network.chunk,
            "min-max" if search.percent is None else f"percentile {search.percent}",
        ),
        reference_dice_mean=on_reference.parity.mask_dice_mean,
        runs=runner.runs,
    )
    return QuantizedGraphs(
        graphs=encoder.graphs, decoder_of=base.precision, recipe=recipe, parity=encoder.parity
    )


def _choose_layers(search: Search, on_step: OnStep) -> Choice:
    """All layers, or all except the most costly ones; ParityError if no choice agrees."""
    on_step("try how far INT8 codes should reach")
    layers, left_out = search.layers, list[LinearLayer]()
    candidate = search.choose_reach()
    encoder = None if candidate.failures else search.measured_encoder(layers)
    if encoder is None or encoder.failures:
        on_step("measure what each kind of layer and each block costs")
        order = search.most_costly_first()
        for step in range(1, STEPS):
            count = ceil(len(order) * step / STEPS)
            left_out, layers = order[:count], order[count:]
            if not layers:
                break
            on_step(f"leave {count} of {len(order)} layers out")
            candidate = search.candidate(layers)
            encoder = None if candidate.failures else search.measured_encoder(layers)
            if encoder is not None and not encoder.failures:
                break
    if encoder is None or encoder.failures:
        problems = "; ".join(candidate.failures if encoder is None else encoder.failures)
        raise ParityError(
            f"{search.precision} masks are not the float32 graphs' ({problems}), "
            "with seven eighths of the layers left out: use fp16, or other calibration images"
        )
    return Choice(encoder=encoder, candidate=candidate, layers=layers, left_out=left_out)
