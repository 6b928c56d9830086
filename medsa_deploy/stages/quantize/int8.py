"""A bundle's float32 encoder and a user's images → an encoder with INT8 linear layers.

Everything is chosen by the masks: how far the codes reach, and which layers stay out. The decoder
is small and stays as it is: the float16 one for TensorRT, the float32 one for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from medsa_deploy.bundle.manifest import Parity, Recipe, Role
from medsa_deploy.errors import ParityError
from medsa_deploy.evaluation.parity import parity_failures
from medsa_deploy.graph.backend_encoders import write_backend_encoders
from medsa_deploy.graph.files import load_graph, save_graph
from medsa_deploy.graph.float16 import round_like_float16, to_float16
from medsa_deploy.graph.float32_nodes import float32_nodes
from medsa_deploy.graph.qdq import LinearLayer, linear_layers, quantize_layers
from medsa_deploy.progress import OnStep

from . import calibration
from .calibration import Measured, Source
from .candidates import CandidateResult, CandidateRunner
from .float16 import Made, cost, counted, of_graph, require_changed

PERCENTS = (None, 99.99, 99.9)
"""How far codes reach: to the extremes, or to a percentile of magnitudes. Each is tried once."""
STEPS = 8
"""Layers are left out in so many steps, until the masks agree."""
LEAST_LOSS = 1e-6
"""A loss below this is not told from none."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The graphs an INT8 encoder goes with."""

    precision: Literal["fp16", "fp32"]
    """Of the decoder, and of all that is not quantized."""
    decoder: Path
    float32_blocks: tuple[str, ...] = ()
    """Blocks that float16 graphs keep in float32."""


@dataclass(frozen=True, kw_only=True)
class MeasuredEncoder:
    """An INT8 encoder's files, and how its masks compare with float32's."""

    graphs: dict[Role, list[Path]]
    """`encoder`, and roles of backends' own encoders → files, the graph first."""
    float32_nodes: dict[int, str]
    """Node that stays float32 → why."""
    parity: Parity
    failures: tuple[str, ...]
    """What exceeds the limits of the precision."""


class Search:
    """INT8 encoders of one network, made from the same measured ranges."""

    def __init__(
        self, trials: CandidateRunner, folder: Path, base: Base, measured: Measured
    ) -> None:
        self.trials, self.folder, self.base, self.measured = trials, folder, base, measured
        self.percent: float | None = None
        self.half = base.precision == "fp16"
        self.precision = "int8" if self.half else "int8-cpu"
        model = load_graph(trials.encoder)
        kept = self._islands(model)
        self.layers = [layer for layer in linear_layers(model) if layer.node not in kept]

    def trial(self, layers: Sequence[LinearLayer]) -> CandidateResult:
        """The masks with `layers` in INT8; what is float16 rounds as float16 does."""
        model = self.quantized(layers)
        if self.half:
            round_like_float16(model, self._islands(model))
        encoder = save_graph(model, self.folder / "encoder.trial.onnx")[0]
        return self.trials.measure(encoder, self.base.decoder, self.precision)

    def quantized(self, layers: Sequence[LinearLayer]) -> Any:
        """The float32 graph with Q/DQ on `layers`."""
        model = load_graph(self.trials.encoder)
        ranges = self.measured.ranges(self.percent)
        change = quantize_layers(model, layers, ranges, unsigned=not self.half)
        require_changed("encoder", change)
        return model

    def write(self, layers: Sequence[LinearLayer]) -> tuple[list[Path], dict[int, str]]:
        """The files of the encoder with `layers` in INT8, and the islands of its float16 part."""
        model = self.quantized(layers)
        kept = self._islands(model)
        if self.half:
            require_changed("encoder", to_float16(model, kept))
        return save_graph(model, self.folder / f"encoder.{self.precision}.onnx"), kept

    def measured_encoder(self, layers: Sequence[LinearLayer]) -> MeasuredEncoder:
        """The encoder as ONNX Runtime runs it, with `layers` in INT8, and the backends' own."""
        files, kept = self.write(sorted(layers, key=lambda layer: layer.node))
        parity = self.trials.measure(files[0], self.base.decoder, self.precision).parity
        graphs: dict[Role, list[Path]] = {"encoder": files}
        for role, path in ({} if self.half else write_backend_encoders(files)).items():
            other = self.trials.measure(path, self.base.decoder, self.precision)
            parity = replace(parity, encoders={**parity.encoders, role: other.parity})
            graphs[role] = [path]
        return MeasuredEncoder(
            graphs=graphs,
            float32_nodes=kept,
            parity=parity,
            failures=tuple(parity_failures(parity)),
        )

    def choose_reach(self) -> CandidateResult:
        """Set how far codes reach to what serves the masks best with every layer in INT8."""
        found: list[tuple[tuple[float, float, float], int, float | None, CandidateResult]] = []
        for percent in PERCENTS:
            self.percent = percent
            trial = self.trial(self.layers)
            found.append((cost(trial.parity), len(found), percent, trial))
        _, _, self.percent, best = min(found)
        return best

    def most_costly_first(self) -> list[LinearLayer]:
        """The layers by what they cost: the cost of their kind times that of their block.

        Each kind alone, and each block alone, is quantized and measured; that takes a run for each,
        where every layer by itself would take one for each pair.
        """
        kinds = {kind: self._loss("kind", kind) for kind in {x.kind for x in self.layers}}
        blocks = {block: self._loss("block", block) for block in {x.block for x in self.layers}}
        return sorted(self.layers, key=lambda x: kinds[x.kind] * blocks[x.block], reverse=True)

    def _loss(self, group: Literal["kind", "block"], name: str) -> float:
        trial = self.trial([layer for layer in self.layers if getattr(layer, group) == name])
        return max(1 - (trial.parity.mask_dice_mean or 0.0), LEAST_LOSS)

    def _islands(self, model: Any) -> dict[int, str]:
        """What stays float32 of the part that becomes float16; nothing does so for the CPU."""
        if not self.half:
            return {}
        blocks = of_graph("encoder", self.base.float32_blocks)
        return float32_nodes(model, blocks=blocks, ranges=self.measured.largest())


def make_int8(
    trials: CandidateRunner,
    reference: CandidateRunner,
    folder: Path,
    base: Base,
    sources: Sequence[Source],
    on_step: OnStep,
    on_image: Callable[[int, int], None],
) -> Made:
    """An INT8 encoder in `folder`; ParityError when none agrees with float32.

    `trials` are on the user's images, `reference` on the saved reference's.
    The search runs the verification cases at most len(PERCENTS) + kinds + blocks + STEPS times.
    """
    on_step("measure the activations of your images")
    inputs = {layer.input for layer in linear_layers(load_graph(trials.encoder))}
    measured = calibration.measure(trials, folder, sources, inputs, on_image)
    search = Search(trials, folder, base, measured)
    on_step("try how far INT8 codes should reach")
    layers, left_out = search.layers, list[LinearLayer]()
    trial = search.choose_reach()
    encoder = None if trial.failures else search.measured_encoder(layers)
    if encoder is None or encoder.failures:
        on_step("measure what each kind of layer and each block costs")
        order = search.most_costly_first()
        for step in range(1, STEPS):
            count = ceil(len(order) * step / STEPS)
            left_out, layers = order[:count], order[count:]
            if not layers:
                break
            on_step(f"leave {count} of {len(order)} layers out")
            trial = search.trial(layers)
            encoder = None if trial.failures else search.measured_encoder(layers)
            if encoder is not None and not encoder.failures:
                break
    if encoder is None or encoder.failures:
        problems = "; ".join(trial.failures if encoder is None else encoder.failures)
        raise ParityError(
            f"{search.precision} masks are not the float32 graphs' ({problems}), "
            "with seven eighths of the layers left out: use fp16, or other calibration images"
        )
    files, kept, parity = encoder.graphs["encoder"], encoder.float32_nodes, encoder.parity
    again = reference.measure(files[0], base.decoder, search.precision)
    recipe = Recipe(
        precision=search.precision,
        target="tensorrt" if search.half else "cpu",
        islands=counted(kept.values()),
        float32_blocks=base.float32_blocks,
        rounded_dice_mean=trial.parity.mask_dice_mean if search.half else None,
        rounded_dice_worst=trial.parity.mask_dice_worst if search.half else None,
        quantized=tuple(x.name for x in sorted(layers, key=lambda layer: layer.node)),
        left_out=tuple(layer.name for layer in left_out),
        weights="int8, symmetric, per channel",
        activations="int8, symmetric" if search.half else "uint8",
        calibration=calibration.described(
            sources,
            trials.manifest.network.chunk,
            "min-max" if search.percent is None else f"percentile {search.percent}",
        ),
        reference_dice_mean=again.parity.mask_dice_mean,
        runs=trials.runs,
    )
    return Made(graphs=encoder.graphs, decoder_of=base.precision, recipe=recipe, parity=parity)
