"""Samples to figures: distributions, blocks and kinds, noise, ratios, and the page of it all."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.bundle.node_names import block_of, innermost, module_named, node_name
from medsa_deploy.evaluation.latency import (
    PERCENTILES,
    Profile,
    compare,
    distribution,
    graph_layers,
    noise,
    percentile,
    ratio_of,
)
from medsa_deploy.evaluation.latency_worker import STAGES
from medsa_deploy.reports import html
from medsa_deploy.reports.latency import milliseconds, profile_page

SAMPLES = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=60)


@given(SAMPLES)
def test_percentiles_are_by_nearest_rank(samples: list[float]) -> None:
    for share in PERCENTILES:
        expected = np.percentile(samples, share, method="inverted_cdf")
        assert percentile(samples, share) == expected


@given(SAMPLES)
def test_a_distribution_keeps_its_samples_and_their_order(samples: list[float]) -> None:
    summary = distribution(samples)
    assert summary.samples_ms == tuple(samples)
    assert summary.count == len(samples)
    assert min(samples) <= summary.p50_ms <= summary.p90_ms <= summary.p95_ms <= summary.p99_ms
    assert summary.p99_ms <= summary.max_ms == max(samples)
    assert summary.mean_ms == pytest.approx(np.mean(samples))
    deviation = np.std(samples, ddof=1) if len(samples) > 1 else 0.0
    assert summary.cv == pytest.approx(deviation / np.mean(samples), abs=1e-9)


def test_what_slices_share_is_also_given_for_one() -> None:
    assert distribution([10.0, 12.0, 20.0], slices=6).per_slice_ms == 2.0
    assert distribution([10.0, 12.0, 20.0]).per_slice_ms is None


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("blocks.3.attention.query/node_MatMul_165", "blocks.3.attention.query"),
        ("/node_add_10", ""),
        ("patch_embed/conv2d_nchwc", "patch_embed"),
        ("fused iou.0/node_linear", "iou.0"),
        ("cast_norm/layer_norm_8_float16", "norm"),
        ("InsertedPrecisionFreeCast_blocks.0.mlp/linear_9", "blocks.0.mlp"),
        ("InsertedPrecisionFreeCast_cast_blocks.0.mlp/linear_9_float16", "blocks.0.mlp"),
        ("image_abcd_acdb_patch_embed/node_conv2d/WithoutBiases", "patch_embed"),
        ("blocks.1/node_add_abcd_acdb_blocks.2/node_mul", "blocks.2"),
        ("ReorderOutput", None),
        ("Subtract_43496_acdb_abcd_Multiply_38597", None),
        ("cast_low_res_masks", None),
    ],
)
def test_modules_are_read_from_what_backends_call_layers(name: str, module: str | None) -> None:
    assert module_named(name) == module


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        ("['', 'blocks', 'blocks.3', 'blocks.3.mlp', 'gelu_3']", "blocks.3.mlp"),
        ("['', 'add_3']", ""),
        ("['add_3']", ""),
        ("['', '_operator', 'add_3']", ""),
        ("", ""),
        ("[", ""),
    ],
)
def test_scopes_of_the_exporter(scopes: str, module: str) -> None:
    assert innermost(scopes) == module
    assert module_named(node_name(module, "node_x")) == module


@pytest.mark.parametrize(
    ("module", "block"),
    [("blocks.3.mlp", "blocks.3"), ("neck.conv", "neck"), ("", "rest"), ("iou.0", "iou.0")],
)
def test_blocks(module: str, block: str) -> None:
    assert block_of(module) == block


def layer(name: str, operator: str, *samples: float) -> dict[str, Any]:
    return {"name": name, "operator": operator, "samples_ms": samples}


def test_layers_are_grouped_by_block_and_kind() -> None:
    layers = graph_layers(
        [
            layer("Reorder_1", "ReorderInput", 1.0, 1.0, 1.0),
            layer("blocks.0.mlp/node_matmul", "MatMul", 4.0, 5.0, 30.0),
            layer("/node_add", "Add", 1.0, 2.0, 3.0),
            layer("neck/node_conv", "Conv", 2.0, 2.0, 2.0),
            layer("blocks.0/node_add", "Mystery", 0.5, 0.5, 0.5),
            layer("neck.x/node_matmul", "FullyConnected", 1.0, 1.0, 1.0),
        ]
    )
    assert layers.count == 3
    assert layers.blocks == {"blocks.0": 6.5, "rest": 2.0, "neck": 3.0}
    assert list(layers.blocks) == ["blocks.0", "rest", "neck"], "as their longest layers run"
    assert layers.kinds == {
        "matrix product": 6.0,
        "elementwise and others": 2.5,
        "convolution": 2.0,
        "layout": 1.0,
    }
    assert sum(timed.percentage for timed in layers.layers) == pytest.approx(100)
    longest = layers.layers[1]
    assert (longest.timeMs, longest.averageMs, longest.medianMs) == (39.0, 13.0, 5.0)
    assert longest.percentage == pytest.approx(100 * 39 / 58.5)
    assert (layers.layers[0].block, layers.layers[0].kind) == ("blocks.0", "layout")


def test_no_layers_are_no_layers() -> None:
    assert graph_layers([]).layers == ()


def stages(**samples: list[float]) -> dict[str, Any]:
    return {name: distribution(values) for name, values in samples.items()}


def test_steady_samples_of_an_idle_machine_raise_no_warning() -> None:
    steady = stages(encode=[10.0, 10.1] * 10, decode=[1.0] * 20)
    assert noise(steady, load=0.3, cores=2) == []
    assert noise(steady, load=None, cores=2) == []


def test_noise_is_named() -> None:
    noisy = stages(encode=[10.0, 10.1] * 2, decode=[1.0, 2.0] * 2)
    scarce, vary, busy = noise(noisy, load=3.25, cores=2)
    assert scarce.startswith("4 samples are few")
    assert "decode 38.5 %" in vary
    assert "encode" not in vary
    assert "3.2 on 2 core(s)" in busy


def around(middle: float, spread: float, seed: int) -> list[float]:
    return list(np.random.default_rng(seed).normal(middle, spread, 30))


def test_a_ratio_comes_with_its_spread() -> None:
    ratio = ratio_of(around(12, 0.2, 1), around(10, 0.2, 2), 1.1)
    assert ratio.ratio == pytest.approx(1.2, rel=0.03)
    assert ratio.low < ratio.ratio < ratio.high
    assert ratio.low > 1.1
    assert ratio.regression
    assert ratio_of(around(12, 0.2, 1), around(10, 0.2, 2), 1.1) == ratio, "the same every time"


@pytest.mark.parametrize(
    ("now", "then", "limit"),
    [
        (around(10, 0.2, 1), around(10, 0.2, 2), 1.1),
        (around(12, 0.2, 1), around(10, 0.2, 2), 1.3),
        (around(10, 0.2, 1), around(12, 0.2, 2), 1.1),
        ([5.0, 40.0, 12.0], [4.0, 41.0, 10.0], 1.1),
    ],
    ids=["as fast", "slower within the limit", "faster", "slower within the noise"],
)
def test_no_regression(now: list[float], then: list[float], limit: float) -> None:
    assert not ratio_of(now, then, limit).regression


def test_a_limit_below_one_asks_for_more_speed() -> None:
    assert ratio_of(around(10, 0.2, 1), around(10, 0.2, 2), 0.5).regression
    assert not ratio_of(around(4, 0.1, 1), around(10, 0.2, 2), 0.5).regression


def test_a_ratio_is_one_of_medians() -> None:
    assert ratio_of([1.0, 2.0], [3.0, 5.0], 1.1).ratio == pytest.approx(1.5 / 4)


def test_other_graphs_of_one_bundle_are_said() -> None:
    other = document(profile())
    other["files_sha256"] = {"encoder.onnx": "0", "decoder.onnx": "1", "gone.onnx": "2"}
    assert compare(profile(), other, "old.json", 1.1).differences == (
        "other graphs: decoder.onnx, gone.onnx",
    )
    other["files_sha256"] = {"encoder.onnx": [1], "decoder.onnx": "9"}
    assert compare(profile(), other, "old.json", 1.1).differences == ("other graphs: encoder.onnx",)
    del other["files_sha256"]
    assert compare(profile(), other, "old.json", 1.1).differences == ()


def test_another_precision_is_no_other_bundle() -> None:
    other = document(profile()) | {"encoder_sha256": "1"}
    assert compare(profile(), other, "old.json", 1.1).differences == (
        "another bundle of the same name: <b>&.medsa",
    )
    other["precision"] = "int8-cpu"
    assert compare(profile(), other, "old.json", 1.1).differences == (
        "another precision: int8-cpu then, fp32 now",
    )


def test_samples_against_themselves_have_ratio_one() -> None:
    ratio = ratio_of([3.0, 1.0, 2.0], [3.0, 1.0, 2.0], 1.1)
    assert ratio.ratio == 1
    assert ratio.low <= 1 <= ratio.high


def profile(scale: float = 1.0, *, slices: int = 1) -> Profile:
    """A profile whose stages take 1, 2, … ms times `scale`."""
    return Profile(
        bundle="<b>&.medsa",
        encoder_sha256="0" * 64,
        files_sha256={"encoder.onnx": "0", "decoder.onnx": "9"},
        backend="onnxruntime",
        precision="fp32",
        threads=None,
        facts={"backend": "onnxruntime", "version": "1", "threads": "all"},
        work="seeded, 64×64",
        slices=slices,
        warm_up=2,
        machine={"processor": "P", "cores": 2, "memory_gb": 8.0, "system": "S"},
        versions={"medsa-deploy": "1", "onnxruntime": "1"},
        measured="2026-01-31T10:00:00+00:00",
        load_ms=100 * scale,
        loaded_mb=50.0,
        peak_mb=80.0,
        stages={
            name: distribution([scale * (i + 1) * f for f in (1.0, 1.01, 0.99)], slices=slices)
            for i, name in enumerate(STAGES)
        },
        layers={
            "encoder": graph_layers([layer("neck/<n>", "Conv", 1.0, 2.0)]),
            "decoder": graph_layers([]),
        },
        warnings=("3 samples < 10",),
    )


def document(of: Profile) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(asdict(of)))
    return parsed


def test_only_clicks_fail_a_comparison() -> None:
    comparison = compare(profile(2.0), document(profile(1.0)), "old.json", 1.5)
    assert comparison.regressions == ["first click", "next click"]
    assert [ratio.ratio for ratio in comparison.ratios.values()] == pytest.approx([2.0] * 6)
    assert comparison.once == {"cold load": 2.0, "peak memory": 1.0}
    assert comparison.differences == ()
    assert compare(profile(2.0), document(profile(1.0)), "old.json", 2.5).regressions == []


def test_what_differs_is_said_then_and_now() -> None:
    other = document(profile())
    other |= {"bundle": "b", "encoder_sha256": "1", "backend": "openvino", "precision": "bf16"}
    other |= {"threads": 4, "work": "a.png, 9×9", "peak_mb": None}
    other["machine"]["processor"] = "Q"
    other["versions"] = {"medsa-deploy": "0", "openvino": "7"}
    comparison = compare(profile(), other, "old.json", 1.1)
    assert comparison.differences == (
        "another bundle: b then, <b>&.medsa now",
        "another backend: openvino then, onnxruntime now",
        "another precision: bf16 then, fp32 now",
        "another number of threads: 4 then, all cores now",
        "another image: a.png, 9×9 then, seeded, 64×64 now",
        "another machine: processor Q then, P now",
        "another version: medsa-deploy 0 then, 1 now",
    )
    assert list(comparison.once) == ["cold load"]


@pytest.mark.parametrize("slices", [1, 6])
@pytest.mark.parametrize("scale", [None, 0.5, 1.0])
def test_the_page_holds_everything_and_needs_nothing(slices: int, scale: float | None) -> None:
    measured = profile(slices=slices)
    if scale is not None:
        comparison = compare(measured, document(profile(scale, slices=slices)), "<old>.json", 1.1)
        measured = replace(measured, comparison=comparison)
    text = profile_page(measured)
    assert not re.search(r"https?:|//|src=|href=|<script|@import|url\(", text)
    assert "<b>&.medsa" not in text
    assert "<old>" not in text
    assert "<n>" not in text
    plots = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(plots) == 3, "samples; the encoder's blocks and kinds; no decoder"
    assert len(plots[0].findall("circle")) == 3 * len(STAGES)
    assert len(plots[1].findall("rect")) == 1
    assert all(f"<td>{name}</td>" in text for name in STAGES)
    assert ("a slice" in text) == (slices > 1)
    assert "3 samples &lt; 10" in text
    verdicts = {
        None: "",
        0.5: "Slower than &lt;old&gt;.json: first click, next click",
        1.0: "No regression against &lt;old&gt;.json",
    }
    assert verdicts[scale] in text
    assert ('class="verdict' in text) == (scale is not None)
    for x in (float(v) for plot in plots for v in (e.get("x", 0) for e in plot.iter("text"))):
        assert 0 <= x <= html.WIDTH


def test_figures_have_few_digits() -> None:
    values = (0.1234, 12.341, 123.41, 1234.1)
    assert [milliseconds(value) for value in values] == ["0.12", "12.34", "123.4", "1234"]
