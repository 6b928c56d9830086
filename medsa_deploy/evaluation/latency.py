"""Samples of runs → distributions, layers by block and kind, warnings about noise, ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.node_names import REST, block_of, module_named

SCHEMA_VERSION = 1
PERCENTILES = (50, 90, 95, 99)
FEW_SAMPLES = 10
"""Below this a median is a guess."""
NOISY_CV = 0.025
"""Coefficient of variation above which trtexec, too, calls a measurement unstable."""
CLICKS = ("first click", "next click")
"""What somebody waits for, and so what a comparison fails on."""
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
"""Kind → operators, in the words of every backend; the rest are `elementwise and others`. OpenVINO
compiles whole attentions and runs of elementwise operators, and calls either a subgraph. What
a `Scan`, a loop, takes beyond its kernels is cutting and joining."""
OTHERS = "elementwise and others"
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
    """p50 over the slices of a chunk, for what is done to all of them."""
    samples_ms: tuple[float, ...]
    """In the order they were taken."""


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """A layer in the words of trtexec's profiles, with what it belongs to."""

    name: str
    operator: str
    block: str
    """`blocks.3`, `neck`, …; `rest` between them."""
    kind: str
    timeMs: float
    """Of all runs together."""
    averageMs: float
    medianMs: float
    percentage: float
    """Of the graph's layers."""


@dataclass(frozen=True, kw_only=True)
class GraphLayers:
    """Where a graph's time goes, by the backend's own profiler, which costs time itself."""

    count: int
    """Runs."""
    layers: tuple[LayerTime, ...]
    """In the order they run."""
    blocks: dict[str, float]
    """Sums of medians, ms, in the order their longest layers run."""
    kinds: dict[str, float]
    """Likewise, largest first."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How a stage compares: p50 here over p50 there."""

    ratio: float
    low: float
    """2.5th percentile of the ratio when both sets of samples are drawn again (bootstrap)."""
    high: float
    """97.5th."""
    regression: bool
    """Above the limit, and by more than the spread: a click only."""


@dataclass(frozen=True, kw_only=True)
class ProfileComparison:
    """A profile against an earlier one."""

    other: str
    """The earlier profile's file."""
    max_slowdown: float
    differences: tuple[str, ...]
    """What else differs between the two, which the ratios then measure as well."""
    ratios: dict[str, Ratio]
    once: dict[str, float]
    """Ratios of what is measured once: `cold load`, `peak memory`."""

    @property
    def regressions(self) -> list[str]:
        """Stages that became too slow."""
        return [stage for stage, ratio in self.ratios.items() if ratio.regression]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that was measured; the JSON document has these fields."""

    bundle: str
    encoder_sha256: str
    files_sha256: dict[str, str]
    """Of every graph that may have run, by its path in the bundle."""
    backend: str
    precision: str
    threads: int | None
    """As asked for; None for all cores."""
    facts: dict[str, Any]
    """What the backend says about itself."""
    work: str
    """What was segmented."""
    slices: int
    """Slices encoded together; 1 for an image."""
    warm_up: int
    """Runs before those that count."""
    machine: dict[str, Any]
    versions: dict[str, str]
    measured: str
    """Date and time, ISO 8601."""
    load_ms: float
    """From a process that has imported nothing of the backend to a session, SHA-256 of every file
    included; the files may be in the system's cache."""
    loaded_mb: float | None
    """Memory of the measuring process, which holds nothing but the runtime; None off Linux."""
    peak_mb: float | None
    """The most it had while running, without the layers' profiler."""
    stages: dict[str, Distribution]
    layers: dict[str, GraphLayers]
    warnings: tuple[str, ...]
    comparison: ProfileComparison | None = None
    what: str = "medsa-deploy profile"
    schema: int = field(default=SCHEMA_VERSION)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` percent of all are not above (nearest rank)."""
    return sorted(samples)[max(0, math.ceil(share / 100 * len(samples)) - 1)]


def distribution(samples: Sequence[float], *, slices: int = 1) -> Distribution:
    """Samples in numbers; `slices`: how many share each of them."""
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


def graph_layers(found: Sequence[Mapping[str, Any]]) -> GraphLayers:
    """Layers as `runtime.backend.Layer` has them → by block and kind.

    A layer that a backend made up (a reordering, a fused activation) has no module in its name and
    goes to the block of the layer before it.
    """
    medians = [median(layer["samples_ms"]) for layer in found]
    totals = [sum(layer["samples_ms"]) for layer in found]
    modules = [module_named(layer["name"]) for layer in found]
    before = next((block_of(m) for m in modules if m is not None), REST)
    blocks: dict[str, float] = {}
    kinds: dict[str, float] = {}
    layers = []
    for layer, module, middle, total in zip(found, modules, medians, totals, strict=True):
        before = before if module is None else block_of(module)
        kind = KIND_OF.get(layer["operator"], OTHERS)
        blocks[before] = blocks.get(before, 0.0) + middle
        kinds[kind] = kinds.get(kind, 0.0) + middle
        layers.append(
            LayerTime(
                name=layer["name"],
                operator=layer["operator"],
                block=before,
                kind=kind,
                timeMs=total,
                averageMs=fmean(layer["samples_ms"]),
                medianMs=middle,
                percentage=100 * total / max(sum(totals), 1e-12),
            )
        )
    longest = {one.block: i for i, one in sorted(enumerate(layers), key=lambda p: p[1].medianMs)}
    return GraphLayers(
        count=max((len(layer["samples_ms"]) for layer in found), default=0),
        layers=tuple(layers),
        blocks=dict(sorted(blocks.items(), key=lambda item: longest[item[0]])),
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
    )


def noise(stages: Mapping[str, Distribution], *, load: float | None, cores: int) -> list[str]:
    """What makes these figures less than certain. `load`: the system's load average before."""
    found = []
    count = min(stage.count for stage in stages.values())
    if count < FEW_SAMPLES:
        found.append(f"{count} samples are few: give --runs {FEW_SAMPLES} or more")
    noisy = [
        f"{name} {100 * stage.cv:.1f} %" for name, stage in stages.items() if stage.cv > NOISY_CV
    ]
    if noisy:
        found.append(
            f"samples vary by more than {100 * NOISY_CV:g} % (coefficient of variation): "
            + ", ".join(noisy)
        )
    if load is not None and load > cores:
        found.append(
            f"the load average was {load:.1f} on {cores} core(s) before it began: something else "
            "was running, or had just been"
        )
    return found


def compare(
    profile: Profile, other: Mapping[str, Any], name: str, max_slowdown: float
) -> ProfileComparison:
    """A profile against an earlier one's JSON document, stage by stage."""
    ratios = {
        stage: ratio_of(
            here.samples_ms,
            other["stages"][stage]["samples_ms"],
            max_slowdown if stage in CLICKS else math.inf,
        )
        for stage, here in profile.stages.items()
    }
    measured_once = {
        "cold load": (profile.load_ms, other.get("load_ms")),
        "peak memory": (profile.peak_mb, other.get("peak_mb")),
    }
    return ProfileComparison(
        other=name,
        max_slowdown=max_slowdown,
        differences=tuple(_differences(profile, other)),
        ratios=ratios,
        once={
            what: now / then
            for what, (now, then) in measured_once.items()
            if now is not None and isinstance(then, float) and then > 0
        },
    )


def _differences(profile: Profile, other: Mapping[str, Any]) -> Iterator[str]:
    """What is not the same in two profiles, then and now."""
    named, files = other.get("bundle"), other.get("files_sha256")
    same = other.get("encoder_sha256") == profile.encoder_sha256
    if not same and named != profile.bundle:
        yield f"another bundle: {named} then, {profile.bundle} now"
    elif not same and other.get("precision") == profile.precision:
        yield f"another bundle of the same name: {named}"
    elif same and isinstance(files, Mapping):
        ours = profile.files_sha256
        if changed := [p for p in sorted({*files, *ours}) if files.get(p) != ours.get(p)]:
            yield f"other graphs: {', '.join(changed)}"
    words = {"backend": "backend", "precision": "precision", "threads": "number of threads"}
    for key, what in (words | {"work": "image"}).items():
        then, now = other.get(key), getattr(profile, key)
        if then != now:
            yield f"another {what}: {then or 'all cores'} then, {now or 'all cores'} now"
    theirs, now = other.get("facts"), profile.facts.get("cuda_graphs")
    then = theirs.get("cuda_graphs") if isinstance(theirs, Mapping) else None
    if (then, now) in ((True, False), (False, True)):
        yield f"CUDA graphs: replayed {'then' if then else 'now'} only"
    for key, what in {"machine": "machine", "versions": "version"}.items():
        theirs = other.get(key)
        for name, now in getattr(profile, key).items():
            then = theirs.get(name, now) if isinstance(theirs, Mapping) else None
            if then != now:
                yield f"another {what}: {name} {then} then, {now} now"


def ratio_of(here: Sequence[float], there: Sequence[float], max_slowdown: float) -> Ratio:
    """Median over median with its 95 % bootstrap interval, by percentiles, the same every time."""
    ratio = float(np.median(here) / np.median(there))
    rng = np.random.default_rng(0)
    drawn = _medians(here, rng) / _medians(there, rng)
    low, high = (float(bound) for bound in np.quantile(drawn, (0.025, 0.975)))
    slower = ratio > max_slowdown and low > min(1, max_slowdown)
    return Ratio(ratio=ratio, low=low, high=high, regression=bool(slower))


def _medians(samples: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of samples drawn again; one drawing at a time, as there may be many samples."""
    values = np.asarray(samples, np.float64)
    return np.array([np.median(rng.choice(values, len(values))) for _ in range(RESAMPLES)])
