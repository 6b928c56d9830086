"""The command line itself: help, versions, exit codes, and what it says about bad options."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from command_line import call, contents, start

from medsa_deploy import __version__, stages
from medsa_deploy.cli.app import COMMANDS
from medsa_deploy.errors import DeviceError, ParityError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes `medsa-deploy doctor` end with an error."""

    def fail_with(error: BaseException) -> None:
        def diagnose() -> None:
            raise error

        monkeypatch.setattr(stages, "diagnose", diagnose)

    return fail_with


def test_stages_are_where_their_table_says() -> None:
    assert not [name for name in stages.__all__ if not hasattr(stages, name)]


def test_there_are_the_commands_of_the_documentation() -> None:
    documented = {
        *("inspect", "export", "quantize", "build-engine", "build-kernels", "cpp", "sign"),
        *("run", "verify", "profile", "doctor", "demo", "dicom-node", "serve", "triton"),
    }
    assert documented == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    done = call(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: medsa-deploy {name} " in done.out
    assert re.search(rf"^ medsa-deploy {name}", done.out, flags=re.MULTILINE)
    assert "--json" in done.out


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert (done.code, done.err) == (0, "")
    assert all(f" {name} " in done.out for name in COMMANDS)


@pytest.mark.parametrize("run", [call, start])
def test_version(run) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"medsa-deploy {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["run"], "Missing argument 'bundle': see medsa-deploy run --help"),
        (["run", "a.medsa"], "give an image, or --from-web URL with --study UID"),
        (["inspect", "a.pth", "b.pth"], "unexpected extra argument"),
        (["export", "a.pth", "--frob"], "No such option: --frob"),
        (["export", "a.pth", "--preprocess", "frob"], "'medsa', 'sam', 'medsam', 'litemedsam'"),
        (["export", "a.pth", "--point-order", "zz"], "'xy', 'yx'"),
        (["export", "a.pth", "--classes", "two"], "valid integer"),
        (["run", "a.medsa", "b.png", "--threads", "x"], "Invalid value for '--threads'"),
        (["run", "a.medsa", "b.png", "--threshold", "x"], "Invalid value for '--threshold'"),
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert message in done.error


RUN = ("run", "a.medsa", "b.png")
EXPORT = ("export", "a.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RUN, "--point", "5"), "--point 5: expected X,Y or X,Y,LABEL with label 1 or 0"),
        ((*RUN, "--point", "5,6,7"), "--point 5,6,7: expected X,Y or X,Y,LABEL"),
        ((*RUN, "--point", "5,6,1,1"), "expected X,Y or X,Y,LABEL"),
        ((*RUN, "--point", "five,6"), "--point five,6: expected numbers between commas"),
        ((*RUN, "--point", "5 6"), "--point 5 6: expected numbers between commas"),
        ((*RUN, "--point", ""), "--point : expected numbers between commas"),
        ((*RUN, "--point", "nan,6"), "--point nan,6: expected numbers between commas"),
        ((*RUN, "--point", "5,inf"), "--point 5,inf: expected numbers between commas"),
        ((*RUN, "--box", "1,2,3"), "--box 1,2,3: expected X0,Y0,X1,Y1"),
        ((*RUN, "--box", "1,2,3,4,5"), "--box 1,2,3,4,5: expected X0,Y0,X1,Y1"),
        ((*RUN, "--box", "1,2,3,x"), "--box 1,2,3,x: expected numbers between commas"),
        ((*RUN, "--box", "1,1,2,2", "--box", "1,1,3,3", "--point", "1,1"), "with one box only"),
        ((*RUN, "--point", "1,1", "--intensity-window", "5"), "expected LOW,HIGH with LOW < HIGH"),
        ((*RUN, "--point", "1,1", "--intensity-window", "5,5"), "5,5: expected LOW,HIGH"),
        ((*RUN, "--point", "1,1", "--intensity-window", "250,-175"), "250,-175: expected LOW,HIGH"),
        ((*RUN, "--point", "1,1", "--intensity-window", "nan,5"), "nan,5: expected numbers"),
        ((*RUN, "--point", "1,1", "--intensity-window", "-inf,5"), "-inf,5: expected numbers"),
        ((*EXPORT, "--intensity-window", "0,inf"), "0,inf: expected numbers"),
        ((*EXPORT, "--intensity-window", "1,2,3"), "1,2,3: expected LOW,HIGH"),
        ((*EXPORT, "--global-blocks", "2,five"), "2,five: expected whole numbers between commas"),
        ((*EXPORT, "--global-blocks", "2.5"), "2.5: expected whole numbers between commas"),
        ((*EXPORT, "--global-blocks", ""), "--global-blocks : expected whole numbers"),
        (("inspect", "a.pth", "--global-blocks", "1,"), "1,: expected whole numbers"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)
def test_malformed_values_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    PIL.Image.new("L", (9, 9)).save("b.png")
    before = contents(Path())
    done = call(*arguments)
    assert done.code == 2
    assert message in done.error
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ParityError("they differ"), 1, "they differ"),
        (DeviceError("two\nlines"), 3, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.dat"), 2, "file or directory: x.dat"),
        (MemoryError(), 3, "out of memory: use a smaller image size"),
        (RuntimeError("boom"), 3, "RuntimeError: boom (a fault in medsa-deploy; --debug shows"),
        (AssertionError(), 3, "AssertionError (a fault in medsa-deploy; --debug shows where)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_one_line_and_an_exit_code(failing, error, code: int, message: str) -> None:
    failing(error)
    done = call("doctor", "--json")
    assert done.code == code
    assert message in done.error


@pytest.mark.parametrize("arguments", [("--debug", "doctor"), ("doctor", "--debug")])
@pytest.mark.parametrize(("error", "code"), [(RuntimeError("boom"), 3), (ParityError("boom"), 1)])
def test_debug_shows_where_an_error_came_from(failing, arguments, error, code: int) -> None:
    failing(error)
    done = call(*arguments)
    assert done.code == code
    assert done.out == ""
    assert "Traceback (most recent call last)" in done.err
    assert "in diagnose" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_warnings_are_said_once_however_often_the_command_line_was_called(
    bundle: Path, tmp_path: Path
) -> None:
    import numpy as np

    np.save(tmp_path / "ct.npy", np.arange(600, dtype=np.int16).reshape(20, 30))
    for _ in range(2):
        done = call("run", bundle, tmp_path / "ct.npy", "--point", "3,4", "--overlay", "o.png")
    assert done.err.count("without a window were stretched") == 1
    assert done.err.startswith("warning: ")


def test_what_a_terminal_cannot_print_does_not_end_a_command(bundle: Path) -> None:
    """A bundle's class names, or an arrow, on a stream that knows ASCII only."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = start("verify", bundle, env=environment)
    assert done.code == 0, done.err
    done = start("verify", "größe.medsa", "--json", env=environment)
    assert done.code == 2
    assert "does not exist" in done.err
    assert "Traceback" not in done.err


# inspect and export


def test_inspect_says_what_a_checkpoint_is(checkpoint_of) -> None:
    done = call("inspect", checkpoint_of("medsa_2d"))
    assert (done.code, done.err) == (0, "")
    for fact in ("Med-SA, ViT", "256×256", "space, mlp", "tables all zero", "--point-order"):
        assert fact in done.out


def test_inspect_as_json(checkpoint_of) -> None:
    done = call("inspect", checkpoint_of("medsa_hyp_2d"), "--json")
    assert (done.code, done.err) == (0, "")
    assert set(done.json) >= {"source", "network", "conventions", "guesses", "notes"}
    assert done.json["network"]["image_size"] == 256
    assert done.json["network"]["hyp_lengths"]
    assert {"--preprocess", "--point-order"} <= {g["option"] for g in done.json["guesses"]}


def test_overrides_reach_the_network(checkpoint_of) -> None:
    options = {
        "--classes": "3",
        "--class-names": "liver, spleen,aorta",
        "--global-blocks": "3,1",
        "--window-size": "14",
        "--heads": "4",
        "--image-size": "128",
        "--preprocess": "medsam",
        "--intensity-window": "-175,250",
        "--point-order": "xy",
        "--point-frame": "image",
        "--point-scale": "2",
        "--threshold": "0.25",
    }
    arguments = [part for option in options.items() for part in option]
    document = call("inspect", checkpoint_of("medsa_2d"), *arguments, "--json").json
    network, conventions = document["network"], document["conventions"]
    assert network["classes"] == 3
    assert network["global_blocks"] == [1, 3]
    assert network["windows"] == [14]
    assert network["heads"] == [4]
    assert network["image_size"] == 128
    assert conventions == {
        "preprocess": "medsam",
        "point_order": "xy",
        "point_frame": "image",
        "point_scale": 2,
        "pad_points": None,
        "prompt_scope": "chunk",
        "intensity_window": [-175, 250],
        "threshold": 0.25,
        "class_names": ["liver", "spleen", "aorta"],
        "postprocess": "sam",
        "prompts": "required",
        "trained_with": "med-sa",
        "mask_choice": "first",
    }


@pytest.fixture
def workplace(checkpoint_of, bundle: Path, tmp_path: Path) -> Path:
    """A folder with a checkpoint, the manifest of its bundle, and files that are no checkpoints."""
    folder = tmp_path / "here"
    shutil.copy(checkpoint_of("medsa_2d"), folder / "ckpt.pth")
    (folder / "ckpt.medsa").mkdir()
    shutil.copy(bundle / "manifest.json", folder / "ckpt.medsa")
    content = (folder / "ckpt.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("weights")
    (folder / "empty.pth").write_bytes(b"")
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3)}, folder / "resnet.pth")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth"], "missing.pth does not exist"),
        (["nowhere/missing.pth"], "nowhere"),
        (["folder"], "folder"),
        (["truncated.pth"], "truncated.pth is truncated or not a checkpoint"),
        (["text.pth"], "text.pth is"),
        (["empty.pth"], "empty.pth is empty"),
        (["resnet.pth"], "resnet.pth: it holds no weights of a SAM"),
        (["ckpt.pth"], "ckpt.medsa exists: replace it with --force, or name another with -o"),
        (["ckpt.pth", "-o", "folder"], "folder exists and is not a bundle"),
        (["ckpt.pth", "-o", "folder", "--force"], "folder exists and is not a bundle"),
        (["ckpt.pth", "-o", "text.pth", "--force"], "text.pth exists and is not a bundle"),
        (["ckpt.pth", "-o", "nowhere/x.medsa"], "nowhere is not a folder"),
        (["ckpt.pth", "-o", "x.medsa", "--images", "missing.png"], "missing.png does not exist"),
        (["ckpt.pth", "-o", "x.medsa", "--images", "folder"], "folder holds no images"),
        (["ckpt.pth", "-o", "x.medsa", "--base", "missing.pth"], "missing.pth does not exist"),
        (["ckpt.pth", "-o", "x.medsa", "--heads", "5"], "5"),
        (["ckpt.pth", "-o", "x.medsa", "--global-blocks", "9"], "--global-blocks"),
        (["ckpt.pth", "-o", "x.medsa", "--image-size", "100"], "--image-size"),
        (["ckpt.pth", "-o", "x.medsa", "--classes", "5"], "--classes 5"),
        (["ckpt.pth", "-o", "x.medsa", "--class-names", "a,b"], "--class-names"),
        (["ckpt.pth", "-o", "x.medsa", "--threshold", "1.5"], "1.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_export_that_cannot_be_made_writes_nothing(
    workplace: Path, arguments: list[str], message: str
) -> None:
    before = contents(workplace)
    done = call("export", *arguments, "--json")
    assert done.code == 2, done.err
    assert message in done.error
    assert contents(workplace) == before


@pytest.mark.parametrize("name", ["missing", "truncated", "text", "empty", "resnet"])
def test_inspect_refuses_what_is_no_checkpoint(workplace: Path, name: str) -> None:
    done = call("inspect", f"{name}.pth")
    assert done.code == 2
    assert name in done.error


def test_an_error_is_one_document_for_programs(tmp_path: Path) -> None:
    missing = tmp_path / "none.pth"
    done = call("inspect", missing, "--json")
    assert done.code == 2
    fault = done.json["error"]
    assert done.json.keys() == {"error"}
    assert (fault["kind"], fault["path"]) == ("CheckpointError", str(missing))
    assert fault["message"] == done.error
    assert "does not exist" in fault["message"]


def test_a_parsers_error_is_one_document_for_programs() -> None:
    done = call("inspect", "a.pth", "--frob", "--json")
    assert done.code == 2
    assert done.json["error"] == {"kind": "UsageError", "message": done.error, "path": None}


def test_a_bundle_that_is_not_there_is_named_for_programs(tmp_path: Path) -> None:
    done = call("verify", tmp_path / "none.medsa", "--json")
    assert done.json["error"]["kind"] == "BundleError"
    assert done.json["error"]["path"] == str(tmp_path / "none.medsa")
