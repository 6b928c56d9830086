"""`medsa-deploy profile`: every kind of bundle, its files, comparisons, refusals and interrupts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from command_line import WITHOUT, call, command, contents, copied

from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import DeviceError
from medsa_deploy.evaluation import latency_worker
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.evaluation.latency_worker import STAGES
from medsa_deploy.reports.latency import milliseconds
from medsa_deploy.stages import LatencyOptions

RUNS = 3
BLOCKS = {
    "medsa_2d": {"patch_embed", "blocks.0", "blocks.3", "neck"},
    "medsa_hyp_2d": {"patch_embed", "blocks.0", "blocks.3", "neck"},
    "medsa_3d_chunk6": {"patch_embed", "blocks.0", "blocks.3", "neck"},
    "medsa_mobile": {"stages.0", "stages.22", "neck"},
    "medsa_efficient": {"patch_embed", "blocks.0", "blocks.11", "neck"},
}
"""Golden case → some of its encoder's blocks."""


@pytest.fixture(scope="module")
def earlier(bundle: Path) -> dict[str, Any]:
    """A profile of the shared bundle. Tests must not change it: copy it first."""
    done = call("profile", bundle, "--runs", RUNS, "--json")
    assert done.code == 0, done.err
    document: dict[str, Any] = done.json
    return document


def check(document: dict[str, Any], runs: int) -> None:
    """What holds for every profile."""
    assert list(document["stages"]) == list(STAGES)
    samples = {name: np.array(stage["samples_ms"]) for name, stage in document["stages"].items()}
    for name, stage in document["stages"].items():
        assert stage["count"] == len(samples[name]) == runs
        assert min(samples[name]) > 0
        assert stage["p50_ms"] in samples[name]
    parts = sum(samples[name] for name in ("preprocess", "encode", "decode", "postprocess"))
    assert (samples["first click"] >= 0.99 * parts).all(), "and what is between them"
    assert list(document["layers"]) == ["encoder", "decoder-image", "decoder-click"]
    for name in ("encoder", "decoder-click"):
        graph = document["layers"][name]
        assert graph["count"] == runs
        assert sum(layer["percentage"] for layer in graph["layers"]) == pytest.approx(100)
        total = sum(layer["medianMs"] for layer in graph["layers"])
        assert sum(graph["blocks"].values()) == pytest.approx(total)
        assert sum(graph["kinds"].values()) == pytest.approx(total)
        assert graph["kinds"]["matrix product"] > 0
        assert max(graph["blocks"], key=graph["blocks"].__getitem__) != "rest"
    assert 0 < document["loaded_mb"] <= document["peak_mb"]
    assert document["load_ms"] > 0
    assert any(f"{runs} samples are few" in warning for warning in document["warnings"])


@pytest.mark.parametrize("name", BLOCKS)
def test_every_kind_of_bundle(name: str, bundle_of: Callable[[str], Path]) -> None:
    manifest = load_manifest(bundle_of(name))
    done = call("profile", bundle_of(name), "--runs", RUNS, "--threads", 2, "--json")
    assert done.code == 0, done.err
    document = done.json
    check(document, RUNS)
    assert BLOCKS[name] <= set(document["layers"]["encoder"]["blocks"])
    assert {"blocks.0", "upscaling"} <= set(document["layers"]["decoder-click"]["blocks"])
    assert (document["backend"], document["precision"], document["threads"]) == (
        "onnxruntime",
        "fp32",
        2,
    )
    assert document["encoder_sha256"] == manifest.file("encoder").sha256
    size, slices = manifest.network.image_size, manifest.network.chunk
    assert document["slices"] == slices
    assert document["work"].startswith(f"seeded, {size}×{size}")
    assert (f"{slices} slices" in document["work"]) == (slices > 1)
    for stage_name, stage in document["stages"].items():
        shared = slices > 1 and stage_name in ("preprocess", "encode")
        assert stage["per_slice_ms"] == (pytest.approx(stage["p50_ms"] / 6) if shared else None)
    assert "warning: " in done.err or document["warnings"]


def test_openvino(bundle: Path) -> None:
    done = call("profile", bundle, "--runs", RUNS, "--backend", "openvino", "--json")
    assert done.code == 0, done.err
    check(done.json, RUNS)
    assert done.json["backend"] == "openvino"
    assert "openvino" in done.json["versions"]
    assert BLOCKS["medsa_2d"] <= set(done.json["layers"]["encoder"]["blocks"])


def test_the_words_and_the_files(bundle: Path, tmp_path: Path) -> None:
    data, html = tmp_path / "p.json", tmp_path / "p.html"
    done = call("profile", bundle, "--runs", 10, "-o", data, "--html", html)
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p.json"]
    document = json.loads(data.read_text(encoding="utf-8"))
    assert document["what"] == "medsa-deploy profile"
    for name in STAGES:
        rows = [line for line in done.out.splitlines() if line.startswith(f"{name}  ")]
        assert milliseconds(document["stages"][name]["p50_ms"]) in rows[0].split()
        assert f"<td>{name}</td>" in html.read_text(encoding="utf-8")
    assert "cold load" in done.out
    assert all(f"\n{name}  " in done.out for name in ("encoder", "decoder-image", "decoder-click"))
    assert "few" not in done.err
    assert "measure 10 runs" in done.err


def test_a_volume(bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.random.default_rng(0).integers(0, 900, (8, 60, 80)).astype(np.int16))
    bundle = bundle_of("medsa_3d_chunk6")
    done = call("profile", bundle, "--runs", 1, "--image", path, "--json")
    assert done.code == 0, done.err
    assert done.json["work"] == "v.npy, 80×60, 6 slices"
    np.save(path, np.load(path)[:4])
    done = call("profile", bundle, "--runs", 1, "--image", path)
    assert done.code == 2
    assert "has 4 slices; this network sees 6 at a time" in done.error


def test_the_middle_of_a_volume_for_a_2d_network(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(5, 40, 50)))
    done = call("profile", bundle, "--image", tmp_path / "v.npy", "--runs", 2, "--json")
    assert done.code == 0, done.err
    assert done.json["work"] == "v.npy, 50×40"
    assert done.err.count("were stretched") == 1


def test_an_image(bundle: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(seeded_image(90, 3)).save(tmp_path / "a.png")
    done = call("profile", bundle, "--runs", 1, "--image", tmp_path / "a.png", "--json")
    assert done.code == 0, done.err
    assert done.json["work"] == "a.png, 90×90"


def scaled(document: dict[str, Any], factor: float) -> dict[str, Any]:
    """A profile as if everything had taken `factor` times as long."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    for stage in copy["stages"].values():
        stage["samples_ms"] = [factor * ms for ms in stage["samples_ms"]]
    return copy


@pytest.mark.parametrize(("factor", "code"), [(0.02, 1), (50, 0)], ids=["slower", "faster"])
def test_a_comparison_fails_on_a_regression(
    bundle: Path, earlier: dict[str, Any], tmp_path: Path, factor: float, code: int
) -> None:
    other, html = tmp_path / "before.json", tmp_path / "p.html"
    other.write_text(json.dumps(scaled(earlier, factor)), encoding="utf-8")
    arguments = ("profile", bundle, "--runs", RUNS, "--compare", other, "--max-slowdown", 2)
    done = call(*arguments, "-o", other, "--html", html)
    assert done.code == code, done.err
    slower = [line for line in done.err.splitlines() if "times as long as in before.json" in line]
    assert len(slower) == (2 if code else 0)
    assert "now / before.json" in done.out
    assert "warning: before.json is of another" not in done.err
    comparison = json.loads(other.read_text(encoding="utf-8"))["comparison"]
    assert list(comparison["ratios"]) == list(STAGES), "and the earlier one is replaced"
    regressions = [name for name, ratio in comparison["ratios"].items() if ratio["regression"]]
    assert regressions == (["first click", "next click"] if code else [])
    for ratio in comparison["ratios"].values():
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert ("Slower than" in html.read_text(encoding="utf-8")) == bool(code)


def test_a_comparison_says_what_else_differs(
    bundle: Path, earlier: dict[str, Any], tmp_path: Path
) -> None:
    other = scaled(earlier, 1000)
    other["machine"]["processor"] = "Abacus"
    other["encoder_sha256"], other["bundle"] = "0" * 64, "other.medsa"
    path = tmp_path / "before.json"
    path.write_text(json.dumps(other), encoding="utf-8")
    done = call("profile", bundle, "--runs", 1, "--compare", path)
    assert done.code == 0, done.err
    differences = [line for line in done.err.splitlines() if "before.json is of another" in line]
    assert len(differences) == 2
    assert differences[0].endswith(f"another bundle: other.medsa then, {bundle.name} now")
    assert "another machine: processor Abacus then" in differences[1]


BROKEN = {
    "nothing.json": (None, "cannot be read"),
    "empty.json": ("", "is not JSON"),
    "list.json": ("[]", "is not a profile"),
    "manifest.json": ('{"schema": 1}', "is not a profile"),
    "later.json": ('{"what": "medsa-deploy profile", "schema": 99}', "has schema 99"),
    "stages.json": ('{"what": "medsa-deploy profile", "schema": 1}', "no samples of the stage"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_profile_is_refused_before_anything_is_measured(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    text, message = BROKEN[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    out = tmp_path / "out.json"
    done = call("profile", bundle, "--compare", tmp_path / name, "-o", out)
    assert done.code == 2
    assert name in done.error
    assert message in done.error
    assert "load the bundle" not in done.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "samples", [[], [0], [-1.0], ["1"], [True], None, [float("nan")], [10**400]]
)
def test_samples_that_are_none_are_refused(
    bundle: Path, earlier: dict[str, Any], tmp_path: Path, samples: object
) -> None:
    other = scaled(earlier, 1)
    other["stages"]["next click"]["samples_ms"] = samples
    path = tmp_path / "before.json"
    path.write_text(json.dumps(other), encoding="utf-8")
    done = call("profile", bundle, "--compare", path)
    assert done.code == 2
    assert "no samples of the stage 'next click'" in done.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--precision", "fp16"], "no encoder in fp16; it has: fp32"),
        (["--precision", "bf16"], "add --backend openvino"),
        (["--threads", "0"], "threads is 0"),
        (["--runs", "0"], "--runs 0"),
        (["--max-slowdown", "1.1"], "goes with --compare"),
        (["--compare", "x.json", "--max-slowdown", "nan"], "--max-slowdown nan"),
        (["--compare", "x.json", "--max-slowdown", "-1"], "--max-slowdown -1"),
        (["-o", "no/such/p.json"], "no/such is not a folder"),
        (["-o", "."], ". is a folder"),
        (["--html", "."], ". is a folder"),
        (["-o", "p", "--html", "./p"], "cannot be both"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: list[str], message: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("profile", bundle, *options)
    assert done.code == 2
    assert message in done.error
    assert "load the bundle" not in done.err
    assert contents(tmp_path) == {}


def test_errors_of_the_measuring_process_are_errors_here(bundle: Path, tmp_path: Path) -> None:
    broken = copied(bundle, tmp_path)
    with (broken / "encoder.onnx").open("ab") as f:
        f.write(b"x")
    done = call("profile", broken, "-o", tmp_path / "p.json")
    assert done.code == 2
    assert "encoder.onnx" in done.error
    missing = call("profile", bundle, "--image", tmp_path / "none.png")
    assert missing.code == 2
    assert "none.png" in missing.error
    assert not (tmp_path / "p.json").exists()


def test_a_warning_of_the_measuring_process_is_a_warning_here(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = call("profile", bundle, "--runs", 1, "--backend", "auto", "--json")
    assert done.code == 0, done.err
    assert done.json["backend"] == "onnxruntime"
    assert "warning: nothing is stored for this bundle on this machine" in done.err


def test_outputs_that_are_read_are_refused_first(
    bundle: Path, earlier: dict[str, Any], tmp_path: Path
) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps(earlier), encoding="utf-8")
    done = call("profile", bundle, "--compare", before, "--html", before)
    assert done.code == 2
    assert "before.json is an input of this profile and would be replaced" in done.error
    done = call("profile", bundle, "-o", bundle / "manifest.json")
    assert done.code == 2
    assert "manifest.json is a file in the bundle and would be replaced" in done.error
    done = call("profile", bundle, "--html", "/dev/null")
    assert done.code == 2
    assert "/dev/null is not a regular file" in done.error


def options(bundle: Path, **changes: Any) -> LatencyOptions:
    fields: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "threads": 1}
    fields |= {"bundle": str(bundle), "runs": 1, "image": None} | changes
    return LatencyOptions(**fields)


def test_a_missing_library_is_named_with_its_extra(bundle: Path) -> None:
    """In the measuring process, which needs it."""
    answer = measured_without(("openvino",), options(bundle, backend="openvino"))
    assert answer["error"] == "MissingDependencyError"
    assert "medsa-deploy[openvino]" in answer["text"]


def measured_without(names: tuple[str, ...], options: LatencyOptions) -> dict[str, Any]:
    """The last message of a measuring process that lacks some libraries."""
    code = WITHOUT.format(names=names) + "from medsa_deploy.child import main\nmain()"
    job = [f"{latency_worker.__name__}:measure_job", json.dumps(vars(options))]
    with subprocess.Popen(
        [sys.executable, "-c", code, *job], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        *_, answer = map(json.loads, process.stdout)
    return answer


def test_a_fault_of_the_measuring_process_shows_where(bundle: Path) -> None:
    with pytest.raises(RuntimeError, match="TypeError") as caught:
        latency_worker.measure_in_child(
            options(bundle, runs="many"), lambda step: None, lambda n, of: None
        )
    assert "Traceback" in "".join(caught.value.__notes__)


def measuring(bundle: Path, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A command that has begun to measure, with outputs and temporary files in `folder`, and the
    number of its measuring process."""
    (folder / "temporary").mkdir()
    process = subprocess.Popen(
        command("profile", bundle, "--runs", 10**6, "-o", folder / "p", "--html", folder / "h"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
    )
    assert process.stderr is not None
    while "warm up" not in (line := process.stderr.readline()):
        assert line, "it ended before it measured"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, int(child)


def left(folder: Path) -> list[str]:
    """Files and folders below `folder`, but for the `.ses` that ONNX Runtime leaves."""
    return [name for name in contents(folder) if name != "temporary/.ses"]


def gone(number: int) -> bool:
    """Whether a process has ended."""
    for _ in range(100):
        if not Path(f"/proc/{number}").exists():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(bundle: Path, tmp_path: Path, number: int) -> None:
    process, child = measuring(bundle, tmp_path)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages.endswith("error: interrupted; no partial output was left behind\n")
    assert "Traceback" not in messages
    assert gone(child)
    assert left(tmp_path) == ["temporary"]


def test_a_killed_measuring_process_is_an_error(bundle: Path, tmp_path: Path) -> None:
    """As when the system runs out of memory."""
    process, child = measuring(bundle, tmp_path)
    os.kill(child, signal.SIGKILL)
    out, messages = process.communicate(timeout=60)
    assert process.returncode == DeviceError.exit_code
    assert out == ""
    assert "error: the measuring process was killed, most often for lack of memory" in messages
    assert left(tmp_path) == ["temporary"]


def test_measuring_needs_no_terminal_and_no_builder(bundle: Path) -> None:
    """Its memory and loading are those of a program that embeds the runtime."""
    names = ("torch", "onnx", "typer", "rich", "openvino")
    assert all(importlib.util.find_spec(name) for name in names)
    assert "result" in measured_without(names, options(bundle))
