"""`medsa-deploy build-engine`: the plan, what is rebuilt and why, what is refused, what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
from command_line import accept_changes, call, contents, copied, edit_manifest
from test_builder import assert_shapes
from test_interrupt import begun, ended

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.bundle.recipe import Recipe
from medsa_deploy.errors import EngineDeviceError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.nvidia import cuda
from medsa_deploy.nvidia.engines import check_loadable, load_engines
from medsa_deploy.stages.build_engine import build, plan
from medsa_deploy.stages.verify.engine_check import engine_states

pytestmark = pytest.mark.tensorrt
TARGETS = "sm75+sm80+sm86+sm89+sm120+sm121"


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with float32 engines for sm86. Tests must not change it: copy it first."""
    copy = copied(bundle, tmp_path_factory.mktemp("built"))
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--target", "sm86", "--json")
    assert done.code == 0, done.err
    assert done.json["built"]
    return copy


def again(bundle: Path, *options: object) -> dict:
    """The plan for the engines of `built`, with other options."""
    arguments = ("--fp32", "--flavor", "rtx", "--target", "sm86", "--dry-run", "--json", *options)
    done = call("build-engine", bundle, *arguments)
    assert done.code == 0, done.err
    return done.json["plan"]


def test_float16_engines_with_nothing_but_a_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own line, in a folder with two bundles: graphs are made first, every target."""
    copy = copied(bundle, tmp_path)
    shutil.copytree(bundle, tmp_path / "older.medsa")
    os.utime(tmp_path / "older.medsa" / "manifest.json", (1, 1))
    monkeypatch.chdir(tmp_path)
    done = call("build-engine", "--fp16")
    assert done.code == 0, done.err
    assert "no bundle named: copy.medsa, the newest here" in done.err
    assert "no --flavor given: no TensorRT with a GPU here, so TensorRT-RTX engines" in done.err
    assert "built, not run" in done.out
    folder = copy / "engines" / f"rtx-fp16-{TARGETS}"
    engine = load_engines(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "decoder.engine",
        "encoder.engine",
        "engine.json",
        "sbom.json",
    ]
    assert [file.attention for file in engine.files] == ["fused", "fused"]
    assert [next(iter(f.sources)) for f in engine.files] == [
        "encoder.fp16.onnx",
        "decoder.fp16.onnx",
    ]
    assert engine.state == "built"
    manifest = load_manifest(copy)
    assert {f.precision for f in manifest.files} == {"fp32", "fp16"}
    shown = stages.verify_bundle(
        copy, checkpoint=None, base=None, images=None, backend="onnxruntime", precision="fp32",
        threads=None,
    )  # fmt: skip
    assert [(e.folder, e.state) for e in shown.engines] == [
        (f"engines/rtx-fp16-{TARGETS}", "built, not run")
    ]
    before = contents(copy)
    plain = call("build-engine", "--fp16", "--no-fused-attention", "--target", "sm75", "--json")
    assert plain.code == 0, plain.err
    assert [f["attention"] for f in plain.json["engine"]["files"]] == ["plain", "plain"]
    assert before.items() <= contents(copy).items()


def test_engines_that_are_up_to_date_are_left_alone(built: Path) -> None:
    before = contents(built)
    times = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    done = call("build-engine", built, "--fp32", "--flavor", "rtx", "--target", "sm86")
    assert done.code == 0
    assert "up to date" in done.out
    assert contents(built) == before
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == times


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_axes_that_do_not_vary_are_static_and_the_runtime_takes_them(
    built: Path, role: str
) -> None:
    """One embedding at a time is the default, so that its axis is static."""
    (folder,) = built.glob("engines/*")
    file, graph = load_engines(folder).file(role), load_manifest(built).graphs[role]
    shapes = assert_shapes(folder / file.path, graph, file.profile)
    batch = {"encoder": -1, "decoder": 1}[role]
    assert shapes["image_embeddings"][0] == batch


def test_a_dry_run_says_what_and_why_and_writes_nothing(bundle: Path, built: Path) -> None:
    before = contents(bundle)
    done = call("build-engine", bundle, "--dry-run", "--flavor", "rtx", "--prompts", "1,2,32")
    assert (done.code, contents(bundle)) == (0, before)
    for part in (
        f"rtx-fp16-{TARGETS}  would be built",
        "because: fp16 graphs are made first",
        "because: not built yet",
        "decoder point_coords      1×0×2        2×2×2        32×16×2",
        "sm75, sm80",
    ):
        assert part in done.out, done.out
    assert again(built)["reasons"] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--force"], "--force"),
        (["--points", "1,3,9"], "points changed from 0,2,16 to 1,3,9"),
        (["--batch", "2,2,2"], "batch changed from 1,1,4 to 2,2,2"),
        (["--no-tf32"], "tf32 changed from True to False"),
        (["--no-fused-attention"], "fused_attention changed from True to False"),
        (["--workspace", "1.5"], "workspace_gb changed from the default to 1.5"),
    ],
)
def test_reasons_to_build_again(built: Path, options: list[str], reason: str) -> None:
    assert again(built, *options)["reasons"] == [reason]


def test_another_version_is_a_reason(built: Path, tmp_path: Path) -> None:
    copy = copied(built, tmp_path)
    path = next(copy.glob("engines/*/engine.json"))
    data = json.loads(path.read_text())
    version, data["version"] = data["version"], "1.0"
    path.write_text(json.dumps(data))
    assert again(copy)["reasons"] == [f"built by TensorRT-RTX 1.0; {version} is installed"]
    path.write_text("{}")
    assert "schema" in again(copy)["reasons"][0]


def test_engines_of_a_changed_graph_are_built_again(built: Path, tmp_path: Path) -> None:
    copy = copied(built, tmp_path)
    model = onnx.load(copy / "encoder.onnx")
    model.producer_name = "another export"
    onnx.save(model, copy / "encoder.onnx")
    refused = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--target", "sm86")
    assert refused.code == 2
    assert "encoder.onnx is not the file the manifest describes" in refused.error
    accept_changes(copy)
    states = engine_states(copy, load_manifest(copy))
    assert "out of date" in states[0].state
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--target", "sm86")
    assert done.code == 0, done.err
    assert "because: the encoder's ONNX file changed since it was built" in done.out
    assert again(copy)["reasons"] == []


def test_changed_engines_are_built_again(built: Path, tmp_path: Path) -> None:
    copy = copied(built, tmp_path)
    path = next(copy.glob("engines/*/decoder.engine"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (reason,) = again(copy)["reasons"]
    assert "decoder.engine is not the engine that engine.json describes" in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp16", "--int8"], "give one of --fp16, --int8 and --fp32"),
        (["--int8"], "has no int8 graphs: add --calibration"),
        (["--target", "sm90"], "does not build for sm90; it builds for: sm75, sm80, sm86, sm89"),
        (["--target", "8.6"], "does not build for 8.6; it builds for: sm75"),
        (
            ["--fp32", "--target", "sm75"],
            "float32 products for sm75: build them with --fp16, or",
        ),
        (["--optimization-level", "3"], "--optimization-level has no effect on TensorRT-RTX"),
        (["--timing-cache", "x"], "--timing-cache has no effect on TensorRT-RTX"),
        (["--points", "1,2"], "--points 1,2: expected MIN,OPT,MAX with 0 ≤ MIN ≤ OPT ≤ MAX"),
        (["--points", "1,2,3,4"], "expected MIN,OPT,MAX"),
        (["--prompts", "0,1,2"], "--prompts 0,1,2: expected MIN,OPT,MAX with 1 ≤ MIN"),
        (["--prompts", "2,1,3"], "--prompts 2,1,3: expected MIN,OPT,MAX"),
        (["--embeddings", "1,3,2"], "--embeddings 1,3,2: expected MIN,OPT,MAX"),
        (["--batch", "1,x,2"], "--batch 1,x,2: expected whole numbers between commas"),
        (["--workspace", "0"], "--workspace 0: expected more than 0 GB"),
        (["--workspace", "nan"], "expected more than 0 GB"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_built_is_one_line(bundle: Path, options: list[str], message: str) -> None:
    before = contents(bundle)
    done = call("build-engine", bundle, "--flavor", "rtx", *options, "--json")
    assert done.code == 2, done.err
    assert message in done.error
    assert contents(bundle) == before


def test_tensorrt_that_is_not_installed_says_what_to_do(bundle: Path) -> None:
    done = call("build-engine", bundle, "--flavor", "tensorrt")
    assert done.code == 2
    assert "pip install 'medsa-deploy[tensorrt]'" in done.error
    assert "--flavor rtx" in done.error


def test_without_a_bundle_here_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".half.medsa.tmp").mkdir()
    (tmp_path / ".half.medsa.tmp" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = call("build-engine", "--fp16")
    assert done.code == 2
    assert "there is no bundle in" in done.error
    assert "medsa-deploy export CHECKPOINT" in done.error


def test_chunks_decide_the_batch(bundle: Path, tmp_path: Path) -> None:
    """By the manifest alone: a network that encodes six slices together."""
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, network__depth_chunk=6, network__sd_trans="public")
    options = again(copy)["options"]
    assert options["batch"] == {"min": 6, "opt": 6, "max": 6}
    assert options["points"]["max"] == 24
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--batch", "6,6,9")
    assert done.code == 2
    assert "all three are multiples of 6" in done.err
    edit_manifest(copy, network__depth_chunk=None, network__slices=4)
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--batch", "4,4,8")
    assert "this network takes 4 slices, no more and no less" in done.err


def test_padded_prompts_have_one_length(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, conventions__pad_points=6)
    assert again(copy)["options"]["points"] == {"min": 6, "opt": 6, "max": 6}


def test_blocks_kept_in_float32_leave_turing_out(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    recipe = Recipe(precision="fp16", float32_blocks=("encoder blocks.1",))
    assert not plan._has_float32(manifest, "fp16")
    assert plan._has_float32(replace(manifest, recipes=(recipe,)), "fp16")
    assert plan._has_float32(manifest, "fp32")


@pytest.mark.parametrize("dry_run", [False, True])
def test_one_plan_is_made_after_the_graphs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    order: list[str] = []

    def note(name: str, result=lambda *arguments, **options: None):
        def call(*arguments, **options):
            order.append(name)
            return result(*arguments, **options)

        return call

    monkeypatch.setattr(build, "quantize_bundle", note("graphs"))
    monkeypatch.setattr(build, "plan_engines", note("plan", build.plan_engines))
    monkeypatch.setattr(build, "_build", note("build"))
    request = plan.EngineRequest(precision="fp16", flavor="rtx")
    result = build.build_engines(bundle, request, dry_run=dry_run)
    assert order == (["plan"] if dry_run else ["graphs", "plan", "build"])
    assert result.built != dry_run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(bundle: Path, tmp_path: Path, number: int) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(tmp_path)
    process = begun("build-engine", copy, "--fp32", "--flavor", "rtx")
    while not list(copy.glob("engines/.*/")):
        assert process.poll() is None, process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    done = ended(process, number)
    assert done.code == 130, done.err
    assert done.err.endswith("error: interrupted; no partial output was left behind\n")
    assert contents(tmp_path) == before
    until = time.monotonic() + 30
    while any(map(running, children)):
        assert time.monotonic() < until, "the builder goes on"


def running(process: str) -> bool:
    """Whether a process is there, and not only waiting for someone to ask how it ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_full_disk_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(copy)
    real = build.engine_builder.Job

    def onto_a_full_disk(**fields):
        return real(**fields | {"output": "/dev/full"})

    monkeypatch.setattr(build.engine_builder, "Job", onto_a_full_disk)
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--target", "sm86")
    assert done.code == 2
    assert done.err.endswith("error: No space left on device: /dev/full\n")
    assert contents(copy) == before


def test_a_damaged_graph_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    content = (copy / "encoder.onnx").read_bytes()
    (copy / "encoder.onnx").write_bytes(content[: len(content) // 2])
    accept_changes(copy)
    before = contents(copy)
    done = call("build-engine", copy, "--fp32", "--flavor", "rtx", "--target", "sm86")
    assert done.code == 2
    assert "encoder.onnx cannot be parsed by TensorRT-RTX" in done.err.splitlines()[-1]
    assert contents(copy) == before


def test_the_engines_that_were_built_are_loadable_where_they_fit(built: Path) -> None:
    (folder,) = built.glob("engines/*")
    manifest, library = load_manifest(built), plan.tensorrt_api.query_library("rtx")
    there = cuda.Device(name="RTX 3090", capability="sm86", driver_cuda="13.0")
    engine = check_loadable(folder, manifest, library=library, device=there)
    assert engine.version == library.version
    with pytest.raises(EngineDeviceError, match="no NVIDIA driver"):
        check_loadable(folder, manifest, library=library, device=None)


@pytest.mark.slow
def test_int8_is_calibrated_and_built_in_one_go(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(4):
        PIL.Image.fromarray(np.asarray(seeded_image(200, i))).save(tmp_path / "images" / f"{i}.png")
    done = call("build-engine", copy, "--int8", "--calibration", tmp_path / "images", "--json")
    assert done.code == 0, done.err
    assert done.json["plan"]["folder"].endswith(f"engines/rtx-int8-{TARGETS}")
    sources = [next(iter(f["sources"])) for f in done.json["engine"]["files"]]
    assert sources[0] == "encoder.int8.onnx"
    assert again(copy)["reasons"] == ["not built yet"]
    assert (
        call("build-engine", copy, "--int8", "--flavor", "rtx", "--dry-run", "--json").json["plan"][
            "reasons"
        ]
        == []
    )
