"""Milliseconds of many runs → distributions, layers by block and kind, warnings, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.node_names import BETWEEN_MODULES, block_of, module_named

SCHEMA_VERSION = 1
PERCENTILES = (50, 90, 95, 99)
FEW_SAMPLES = 10
"""With fewer samples than this, a median is a guess."""
NOISY_CV = 0.025
"""Coefficient of variation above which a measurement is unstable, as trtexec defines it."""
CLICKS = ("first click", "next click")
"""The stages that a user waits for; only these can make a comparison fail."""
RESAMPLES = 2000

KINDS = {
    "matrix product": "MatMul FusedMatMul Gemm FusedGemm FullyConnected MatMulInteger QGemm "
    "QLinearMatMul MatMulIntegerToFloat DynamicQuantizeMatMul",
    "attention": "Attention MultiHeadAttention ScaledDotProductAttention MHA",
    "softmax": "Softmax SoftMax",
    "norm": "LayerNormalization SkipLayerNormalization MVN RMS InstanceNormalization BatchNorm",
    "convolution": "Conv FusedConv Convolution ConvTranspose Deconvolution GroupConvolution",
    "activation": "Gelu BiasGelu FastGelu Relu Sigmoid Tanh HardSigmoid HardSwish Clip Eltwise",
    "quantization": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear FakeQuantize",
    "layout": "Reshape Transpose Slice StridedSlice Pad Concat Split VariadicSplit Gather Expand "
    "Squeeze Unsqueeze Reformat ReorderInput ReorderOutput Reorder Tile Broadcast Cast Convert "
    "Shape ShapeOf Range Flatten Scan",
    "fused subgraph": "Subgraph",
}
"""Kind → operators, by every backend's names; the rest are `elementwise and others`. OpenVINO
compiles whole attentions and runs of elementwise operators, and calls either a subgraph. The time
of a `Scan` (a loop) beyond its kernels is spent on cutting and joining."""
ELEMENTWISE = "elementwise and others"
KIND_OF = {operator: kind for kind, names in KINDS.items() for operator in names.split()}


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Milliseconds of one stage over all runs."""

    count: int
    mean_ms: float
    p50_ms: float
    """Percentiles are by nearest rank: each is one of the samples."""
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    cv: float
    """Standard deviation over mean."""
    per_slice_ms: float | None
    """p50 over the number of slices, for stages that run on a whole chunk."""
    samples_ms: tuple[float, ...]
    """In the order they were measured."""


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """A layer with the field names of trtexec's profiles, its block and its kind."""

    name: str
    operator: str
    block: str
    """`blocks.3`, `neck`, …; `rest` for layers between modules."""
    kind: str
    timeMs: float
    """Sum over all runs."""
    averageMs: float
    medianMs: float
    percentage: float
    """Share of the time of all layers of the graph."""


@dataclass(frozen=True, kw_only=True)
class GraphLayers:
    """The time of a graph's layers, by the backend's own profiler, which slows it down."""

    count: int
    """Runs."""
    layers: tuple[LayerTime, ...]
    """In the order they run."""
    blocks: dict[str, float]
    """Sums of medians, ms, in the order their longest layers run."""
    kinds: dict[str, float]
    """Sums of medians, ms, largest first."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """p50 of a stage in this profile over p50 in the earlier one."""

    ratio: float
    low: float
    """2.5th percentile of the ratio over bootstrap samples of both."""
    high: float
    """97.5th percentile."""
    regression: bool
    """Whether a click became slower than the limit, by more than the spread of the samples."""


@dataclass(frozen=True, kw_only=True)
class ProfileComparison:
    """A latency profile against an earlier one."""

    other: str
    """The earlier profile's file."""
    max_slowdown: float
    differences: tuple[str, ...]
    """Other differences between the two profiles, which also affect the ratios."""
    ratios: dict[str, Ratio]
    once: dict[str, float]
    """Ratios of figures that are measured once: `cold load`, `peak memory`."""

    @property
    def regressions(self) -> list[str]:
        """Stages that became too slow."""
        return [stage for stage, ratio in self.ratios.items() if ratio.regression]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A bundle's latency on this machine; the JSON document has these fields."""

    bundle: str
    encoder_sha256: str
    files_sha256: dict[str, str]
    """Path in the bundle → SHA-256, for every graph that may have run."""
    backend: str
    precision: str
    threads: int | None
    """Threads of one run; None for all cores."""
    facts: dict[str, Any]
    """The backend's version and how it runs."""
    work: str
    """The image or volume that was segmented, in words."""
    slices: int
    """Slices encoded together; 1 for an image."""
    warm_up: int
    """Runs before the measured runs."""
    machine: dict[str, Any]
    versions: dict[str, str]
    measured: str
    """Date and time, ISO 8601."""
    load_ms: float
    """From a process that has imported nothing of the backend to an open session, including the
    SHA-256 of every file. The files may be in the system's cache."""
    loaded_mb: float | None
    """MiB of the measuring process, which runs nothing but the runtime; None off Linux."""
    peak_mb: float | None
    """Peak MiB while running, without the layers' profiler."""
    stages: dict[str, Distribution]
    layers: dict[str, GraphLayers]
    warnings: tuple[str, ...]
    comparison: ProfileComparison | None = None
    what: str = "medsa-deploy profile"
    schema: int = field(default=SCHEMA_VERSION)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that is not below `share` percent of all samples (nearest rank)."""
    return sorted(samples)[max(0, math.ceil(share / 100 * len(samples)) - 1)]


def distribution(samples: Sequence[float], *, slices: int = 1) -> Distribution:
    """Summarise samples in milliseconds; `slices`: the number of slices that each sample covers."""
    mean = fmean(samples)
    p50, p90, p95, p99 = (percentile(samples, share) for share in PERCENTILES)
    return Distribution(
        count=len(samples),
        mean_ms=mean,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=max(samples),
        cv=stdev(samples) / mean if len(samples) > 1 and mean > 0 else 0.0,
        per_slice_ms=p50 / slices if slices > 1 else None,
        samples_ms=tuple(samples),
    )


def graph_layers(timed_layers: Sequence[Mapping[str, Any]]) -> GraphLayers:
    """A graph's `TimedLayer`s as JSON has them → the same by block and kind.

    A layer that a backend adds (a reordering, a fused activation) has no module in its name. It
    counts to the block of the layer before it.
    """
    medians = [median(layer["samples_ms"]) for layer in timed_layers]
    totals = [sum(layer["samples_ms"]) for layer in timed_layers]
    modules = [module_named(layer["name"]) for layer in timed_layers]
    block = next((block_of(m) for m in modules if m is not None), BETWEEN_MODULES)
    blocks: dict[str, float] = {}
    kinds: dict[str, float] = {}
    layers = []
    for layer, module, median_ms, total in zip(timed_layers, modules, medians, totals, strict=True):
        block = block if module is None else block_of(module)
        kind = KIND_OF.get(layer["operator"], ELEMENTWISE)
        blocks[block] = blocks.get(block, 0.0) + median_ms
        kinds[kind] = kinds.get(kind, 0.0) + median_ms
        layers.append(
            LayerTime(
                name=layer["name"],
                operator=layer["operator"],
                block=block,
                kind=kind,
                timeMs=total,
                averageMs=fmean(layer["samples_ms"]),
                medianMs=median_ms,
                percentage=100 * total / max(sum(totals), 1e-12),
            )
        )
    longest = {
        layer.block: i for i, layer in sorted(enumerate(layers), key=lambda p: p[1].medianMs)
    }
    return GraphLayers(
        count=max((len(layer["samples_ms"]) for layer in timed_layers), default=0),
        layers=tuple(layers),
        blocks=dict(sorted(blocks.items(), key=lambda item: longest[item[0]])),
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
    )


def noise(stages: Mapping[str, Distribution], *, load: float | None, cores: int) -> list[str]:
    """Warnings about uncertain figures. `load`: the system's load average before the first run."""
    warnings = []
    count = min(stage.count for stage in stages.values())
    if count < FEW_SAMPLES:
        warnings.append(f"{count} samples are few: give --runs {FEW_SAMPLES} or more")
    noisy = [
        f"{name} {100 * stage.cv:.1f} %" for name, stage in stages.items() if stage.cv > NOISY_CV
    ]
    if noisy:
        warnings.append(
            f"samples vary by more than {100 * NOISY_CV:g} % (coefficient of variation): "
            + ", ".join(noisy)
        )
    if load is not None and load > cores:
        warnings.append(
            f"the load average was {load:.1f} on {cores} core(s) before it began: other programs "
            "were running, or had just ended"
        )
    return warnings


def compare(
    profile: Profile, earlier: Mapping[str, Any], name: str, max_slowdown: float
) -> ProfileComparison:
    """Compare a profile with an earlier one's JSON document, stage by stage."""
    ratios = {
        stage: ratio_of(
            distribution.samples_ms,
            earlier["stages"][stage]["samples_ms"],
            max_slowdown if stage in CLICKS else math.inf,
        )
        for stage, distribution in profile.stages.items()
    }
    measured_once = {
        "cold load": (profile.load_ms, earlier.get("load_ms")),
        "peak memory": (profile.peak_mb, earlier.get("peak_mb")),
    }
    return ProfileComparison(
        other=name,
        max_slowdown=max_slowdown,
        differences=tuple(_differences(profile, earlier)),
        ratios=ratios,
        once={
            figure: now / then
            for figure, (now, then) in measured_once.items()
            if now is not None and isinstance(then, float) and then > 0
        },
    )


def _differences(profile: Profile, earlier: Mapping[str, Any]) -> Iterator[str]:
    """The differences between two profiles other than time, in words."""
    bundle_then, files_then = earlier.get("bundle"), earlier.get("files_sha256")
    same_encoder = earlier.get("encoder_sha256") == profile.encoder_sha256
    if not same_encoder and bundle_then != profile.bundle:
        yield f"another bundle: {bundle_then} then, {profile.bundle} now"
    elif not same_encoder and earlier.get("precision") == profile.precision:
        yield f"another bundle of the same name: {bundle_then}"
    elif same_encoder and isinstance(files_then, Mapping):
        files_now = profile.files_sha256
        paths = sorted({*files_then, *files_now})
        if changed := [path for path in paths if files_then.get(path) != files_now.get(path)]:
            yield f"other graphs: {', '.join(changed)}"
    words = {"backend": "backend", "precision": "precision", "threads": "number of threads"}
    for key, word in (words | {"work": "image"}).items():
        then, now = earlier.get(key), getattr(profile, key)
        if then != now:
            yield f"another {word}: {then or 'all cores'} then, {now or 'all cores'} now"
    facts_then, now = earlier.get("facts"), profile.facts.get("cuda_graphs")
    then = facts_then.get("cuda_graphs") if isinstance(facts_then, Mapping) else None
    if (then, now) in ((True, False), (False, True)):
        yield f"CUDA graphs: replayed {'then' if then else 'now'} only"
    for key, word in {"machine": "machine", "versions": "version"}.items():
        values_then = earlier.get(key)
        for name, now in getattr(profile, key).items():
            then = values_then.get(name, now) if isinstance(values_then, Mapping) else None
            if then != now:
                yield f"another {word}: {name} {then} then, {now} now"


def ratio_of(now_ms: Sequence[float], then_ms: Sequence[float], max_slowdown: float) -> Ratio:
    """Median over median with its 95 % bootstrap interval, by percentiles; always the same."""
    ratio = float(np.median(now_ms) / np.median(then_ms))
    rng = np.random.default_rng(0)
    ratios = _medians(now_ms, rng) / _medians(then_ms, rng)
    low, high = (float(bound) for bound in np.quantile(ratios, (0.025, 0.975)))
    slower = ratio > max_slowdown and low > min(1, max_slowdown)
    return Ratio(ratio=ratio, low=low, high=high, regression=bool(slower))


def _medians(samples: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of bootstrap samples, drawn one at a time because there may be many samples."""
    values = np.asarray(samples, np.float64)
    return np.array([np.median(rng.choice(values, len(values))) for _ in range(RESAMPLES)])
