"""Engines against the checkpoint's network: verified, wrong, or not for this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_gpu
import numpy as np
import onnxruntime
import pytest
from command_line import copied
from fake_engines import compute, describe, session_of, write
from fake_gpu import Machine
from fake_network import SIDE, BrightPixels

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest, save_manifest
from medsa_deploy.child import ChildError, Job
from medsa_deploy.evaluation.cases import seeded_case
from medsa_deploy.evaluation.parity import LIMITS, run_case
from medsa_deploy.nvidia.engines import AxisRange, load_engines
from medsa_deploy.runtime import Session
from medsa_deploy.stages.verify import engine_check
from medsa_deploy.stages.verify.engine_check import EngineState

STATE = EngineState(folder="engines/x", state="built, not run")
CASE = seeded_case(SIDE, None, 1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Stand-ins in this process, which is the one that runs the engines."""
    machine = fake_gpu.install(monkeypatch)

    def run(function: Job, job: object) -> object:
        answer = function(json.loads(json.dumps(job)), lambda note: None)
        return json.loads(json.dumps(answer))

    monkeypatch.setattr(engine_check, "run_in_child", run)
    return machine


@pytest.fixture
def plain(machine: Machine) -> Session:
    return session_of(machine)


@pytest.fixture
def engine_bundle(plain: Session, tmp_path: Path) -> Path:
    """A bundle with engines for up to three prompts of up to four points."""
    bundle = tmp_path / "a.medsa"
    write(bundle / "engines" / "x", plain.manifest, describe())
    save_manifest(plain.manifest, bundle)
    return bundle


def checked(bundle: Path, plain: Session) -> EngineState:
    expected = [run_case(plain, CASE).tensors]
    return engine_check.state_of(bundle, STATE, [CASE], expected, None)


def written(bundle: Path) -> str:
    return load_engines(bundle / "engines" / "x").state


def test_engines_that_agree_are_verified(engine_bundle: Path, plain: Session) -> None:
    engines = checked(engine_bundle, plain)
    assert (engines.state, engines.failures) == ("verified", ())
    assert engines.parity is not None
    assert engines.parity.tensors["low_res_masks"].relative_l2 == 0
    assert written(engine_bundle) == "verified"


def test_engines_that_differ_are_not_verified_any_more(
    engine_bundle: Path, plain: Session, machine: Machine
) -> None:
    checked(engine_bundle, plain)
    compute(machine, plain.manifest, BrightPixels(plain.manifest.network, clicks=0.3))
    engines = checked(engine_bundle, plain)
    assert engines.state.startswith("failed: low_res_masks: relative L2")
    assert engines.failures
    assert written(engine_bundle) == "built"


def test_an_engine_that_cannot_run_is_a_failure(
    engine_bundle: Path, plain: Session, machine: Machine
) -> None:
    machine.refuses = "Error Code 3"
    assert "Error Code 3" in checked(engine_bundle, plain).failures[0]


def test_an_engine_of_another_version_is_not_run(
    engine_bundle: Path, plain: Session, monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.0.0")
    engines = checked(engine_bundle, plain)
    assert engines.state.startswith("built, not run; not run here: ")
    assert "11.0.0 is installed" in engines.state
    assert engines.failures == ()
    assert written(engine_bundle) == "built"


def test_a_process_that_ends_early_is_a_failure(
    engine_bundle: Path, plain: Session, monkeypatch
) -> None:
    def die(function: Job, job: object) -> object:
        raise ChildError("signal 11: Segmentation fault", code=-11)

    monkeypatch.setattr(engine_check, "run_in_child", die)
    expected = "its process ended with signal 11: Segmentation fault"
    assert checked(engine_bundle, plain).failures == (expected,)


def test_tf32_is_judged_like_float16() -> None:
    assert engine_check.engine_limits("fp32", None, tf32=False).relative_l2 == 1e-4
    assert engine_check.engine_limits("fp32", None, tf32=True) == LIMITS["fp16"]


def test_the_process_says_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    """The real one, where there is no GPU."""
    machine = fake_gpu.install(monkeypatch)
    plain = session_of(machine)
    bundle = tmp_path / "a.medsa"
    folder = write(bundle / "engines" / "x", plain.manifest, describe("rtx", batch=SINGLE))
    save_manifest(plain.manifest, bundle)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    case, outputs = seeded_case(SIDE, None, 1), run_case(plain, CASE).tensors
    reason = engine_check.check_engine(bundle, folder, [case], [outputs])
    assert isinstance(reason, str)
    assert str(folder) in reason


SINGLE = AxisRange(min=1, opt=1, max=1)


def test_verify_runs_engines_where_there_is_a_gpu(
    bundle: Path, tmp_path: Path, machine: Machine
) -> None:
    """The engines compute what ONNX Runtime does with the bundle's own graphs."""
    copy = copied(bundle, tmp_path)
    manifest = load_manifest(copy)
    for role in ("encoder", "decoder"):
        session = onnxruntime.InferenceSession(copy / manifest.file(role).path)
        names = [t.name for t in manifest.graphs[role].outputs]

        def function(*, session=session, names=names, **inputs: np.ndarray):
            return dict(zip(names, session.run(names, inputs), strict=True))

        graph = manifest.graphs[role]
        function.tensors = {t.name: t.shape for t in (*graph.inputs, *graph.outputs)}
        machine.functions[role] = function
    write(copy / "engines" / "x", manifest, describe())
    verification = stages.verify_bundle(
        copy,
        checkpoint=None,
        base=None,
        images=None,
        backend="onnxruntime",
        precision=None,
        threads=None,
    )
    assert [(state.state, state.failures) for state in verification.engines] == [("verified", ())]
    assert verification.failures == ()
    assert load_engines(copy / "engines" / "x").state == "verified"
