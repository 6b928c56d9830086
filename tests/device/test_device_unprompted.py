"""No points at all on engines: networks without prompts, and a mask that is the whole prompt."""

from __future__ import annotations

from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from device_sessions import frame, open_engines
from fake_engines import describe, session_of, write
from fake_gpu import Machine
from fake_network import SIDE
from numpy.testing import assert_array_equal

from medsa_deploy import errors
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.runtime import Session

NONE = AxisRange(min=0, opt=0, max=0)
DYNAMIC = AxisRange(min=0, opt=2, max=4)
LABELS = {"classes": 3, "outputs": "labels", "postprocess": "samed"}


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize(
    ("need", "points"), [("none", NONE), ("none", DYNAMIC), ("optional", DYNAMIC)]
)
def test_networks_without_prompts_run_on_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, need: str, points: AxisRange
) -> None:
    machine = fake_gpu.install(monkeypatch, name=library)
    flavor = "rtx" if library == "tensorrt_rtx" else "tensorrt"
    plain = session_of(machine, prompts=need, **LABELS)
    folder = write(tmp_path / "x", plain.manifest, describe(flavor, points=points))
    with open_engines(plain, folder, flavor=flavor) as session:
        for seed in (0, 1, 1, 2):  # the third replays a CUDA graph
            prediction = session.segment(session.encode(frame(seed)))
            expected = plain.segment(plain.encode(frame(seed)))
            assert set(np.unique(expected.labels)) == {0, 1, 2, 3}
            assert_array_equal(prediction.labels, expected.labels)
            assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
            assert_array_equal(prediction.probabilities, expected.probabilities)
    assert machine.used == machine.pinned == 0


def test_a_mask_alone_runs_on_engines(machine: Machine, plain: Session, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", plain.manifest, describe(points=DYNAMIC))
    mask = np.random.default_rng(0).normal(size=(2, SIDE, SIDE)).astype(np.float32)
    image = frame(0)
    with open_engines(plain, folder) as session:
        for prompt in ({"mask": mask[0]}, {"mask": mask}, {"mask": mask[1], "points": [(20, 30)]}):
            prediction = session.segment(session.encode(image), **prompt)
            expected = plain.segment(plain.encode(image), **prompt)  # the engines add the mask
            logits = expected.low_res_logits + np.reshape(prompt["mask"], (-1, 1, SIDE, SIDE))
            assert_array_equal(prediction.low_res_logits, logits)


def test_engines_for_at_least_a_point_say_how_to_build_others(plain: Session, folder: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.float32)
    with (
        open_engines(plain, folder) as session,
        pytest.raises(errors.PromptError, match=r"0 points.*take 1 to 4, which --points"),
    ):
        session.segment(session.encode(frame(0)), mask=mask)
