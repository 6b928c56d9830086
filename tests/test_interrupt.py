"""Ctrl-C and a polite kill: exit code 130, and no partial output is left behind."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from command_line import Done, command, contents, copied, edit_manifest

from medsa_deploy import read_image
from medsa_deploy.evaluation.cases import seeded_image

MOMENTS = {
    "torch is imported": "",
    "the encoder is exported": "run the checkpoint's own network",
    "the graphs are proved": "export the decoder",
}
"""What happens when the signal comes → the step whose end announces it; torch has none."""


def begun(*arguments: object) -> subprocess.Popen[str]:
    """A `medsa-deploy` process, running."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], number: int, *, times: int = 1) -> Done:
    """What a process left when it was sent a signal `number`, several times in a row or once."""
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


def assert_interrupted(done: Done) -> None:
    assert done.code == 130, done.err
    assert done.error == "interrupted; no partial output was left behind"


def wait_for(step: str, process: subprocess.Popen[str]) -> None:
    """Until `step` is reported as done; without one, until torch's libraries are being loaded."""
    assert process.stderr is not None
    while not step and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, "the export ended before it imported torch"
    while step and step not in (line := process.stderr.readline()):
        assert line, "the export ended before its step"


@pytest.mark.parametrize(
    ("number", "moment", "times"),
    [
        (signal.SIGTERM, "torch is imported", 1),
        (signal.SIGINT, "the encoder is exported", 3),
        (signal.SIGTERM, "the graphs are proved", 1),
    ],
)
def test_an_interrupted_export_leaves_the_earlier_bundle(
    checkpoint_of, bundle: Path, tmp_path: Path, number: int, moment: str, times: int
) -> None:
    earlier = copied(bundle, tmp_path)
    edit_manifest(earlier, conventions__threshold=0.25)
    before = contents(tmp_path)
    process = begun("export", checkpoint_of("medsa_2d"), "-o", earlier, "--force")
    wait_for(MOMENTS[moment], process)
    assert_interrupted(ended(process, number, times=times))
    assert contents(tmp_path) == before


def test_an_interrupted_first_export_leaves_nothing(checkpoint_of, tmp_path: Path) -> None:
    process = begun("export", checkpoint_of("medsa_2d"), "-o", tmp_path / "new.medsa")
    wait_for(MOMENTS["the encoder is exported"], process)
    assert len(list(tmp_path.iterdir())) == 1, "the temporary folder"
    assert_interrupted(ended(process, signal.SIGTERM))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("step", ["run the float32 graphs", "run with every result rounded"])
def test_an_interrupted_quantization_leaves_the_bundle(
    bundle: Path, tmp_path: Path, step: str
) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(tmp_path)
    process = begun("quantize", copy, "--fp16")
    wait_for(step, process)
    assert_interrupted(ended(process, signal.SIGTERM))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_folder_leaves_whole_masks_only(
    bundle: Path, tmp_path: Path, number: int
) -> None:
    frames, masks = tmp_path / "frames", tmp_path / "masks"
    frames.mkdir()
    pixels = seeded_image(300, 1)
    for i in range(300):
        PIL.Image.fromarray(np.roll(pixels, i, axis=1)).save(frames / f"{i:03}.bmp")
    process = begun("run", bundle, frames, "--point", "100,100", "-o", masks)
    while not (masks.exists() and len(list(masks.glob("[0-9]*.mask.png"))) > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert_interrupted(ended(process, number))
    written = sorted(path.name for path in masks.iterdir())
    assert 3 < len(written) < 300
    assert written == [f"{i:03}.bmp.mask.png" for i in range(len(written))]
    for name in written:
        assert np.asarray(PIL.Image.open(masks / name)).shape == (300, 300)
    read_image(masks / written[-1])


def test_a_command_that_ignores_hangups_goes_on(bundle: Path) -> None:
    """As under nohup: what the parent ignores stays ignored."""
    shell = f"trap '' HUP; exec {' '.join(command('verify', bundle))}"
    process = subprocess.Popen(
        ["sh", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for("compare every file with its SHA-256", process)
    assert ended(process, signal.SIGHUP).code == 0
