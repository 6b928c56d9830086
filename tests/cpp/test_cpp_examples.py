"""`medsa-deploy cpp`, and its examples: built by CMake with sanitizers, run as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, copied, edit_manifest
from cpp_driver import HEADERS, SANITIZERS, library
from filelock import FileLock
from PIL import Image

from medsa_deploy import load
from medsa_deploy.evaluation.cases import seeded_image

PROJECT = HEADERS.parent
FILES = {path.relative_to(PROJECT).as_posix() for path in PROJECT.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def examples(shared_folder: Path) -> Path:
    """The build folder of the project that `medsa-deploy cpp` writes."""
    folder = shared_folder / "medsa-cpp"
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "build" / "stream").exists():
            assert call("cpp", "-o", folder, "--force").code == 0
            flags = f"-DCMAKE_CXX_FLAGS=-Werror {' '.join(SANITIZERS)}"
            configure = ["cmake", "-S", folder, "-B", folder / "build", "-DCMAKE_BUILD_TYPE="]
            for command in ([*configure, flags], ["cmake", "--build", folder / "build"]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build"


def run(program: Path, *words: object, data: bytes = b"", **variables: str) -> Any:
    """Run an example with ONNX Runtime's library of the installed wheel."""
    return subprocess.run(
        [program, *map(str, words)],
        input=data,
        capture_output=True,
        env=os.environ | {"MEDSA_ONNXRUNTIME": str(library())} | variables,
        check=False,
    )


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A PPM and its pixels."""
    pixels = seeded_image(120, 3)[:90]
    Image.fromarray(pixels).save(tmp_path / "image.ppm")
    return tmp_path / "image.ppm", pixels


def test_the_command_copies_everything(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    done = call("cpp", "-o", folder, "--json")
    assert set(done.json["files"]) == FILES | {"VERSION"}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *FILES,
        "VERSION",
    }
    assert "replace it with --force" in call("cpp", "-o", folder).error
    (folder / "stale.hpp").touch()
    assert call("cpp", "-o", folder, "--force").code == 0
    assert not (folder / "stale.hpp").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").touch()
    done = call("cpp", "-o", other, "--force")
    assert (done.code, "is no copy of the C++ runtime" in done.error) == (2, True)
    assert call("cpp", "-o", other / "thesis.txt" / "copy").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "mine"]


@pytest.mark.slow
def test_the_wheel_holds_them(tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files"], cwd=tree, capture_output=True, check=True).stdout
    for name in listed.decode().splitlines():
        if name.startswith(("medsa_deploy/", "exporters/", "kernels/")) or "/" not in name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, root / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"medsa_deploy/cpp/{name}" for name in FILES} <= set(names)


def test_segment(
    examples: Path, bundle: Path, picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of Python's session; ONNX Runtime writes nothing into the home folder."""
    path, pixels = picture
    prompt = ("--point", "40,30", "--point", "80,70,0", "--box", "10,10,90,80")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    words = (bundle, path, "-o", tmp_path / "mask.pgm", *prompt)
    done = run(examples / "segment", *words, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    with load(bundle) as session:
        expected = session.segment(
            session.encode(pixels), points=[(40, 30), (80, 70)], labels=[1, 0], box=(10, 10, 90, 80)
        )
    mask = np.asarray(Image.open(tmp_path / "mask.pgm"))
    assert np.array_equal(mask, expected.mask * np.uint8(255))
    assert done.stdout.decode().startswith(f"mask: {expected.mask.sum()} pixels in ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.ppm", "mask.pgm"]


def test_segment_16_bits(examples: Path, bundle_of, tmp_path: Path) -> None:
    """A network that needs no prompt, on intensities: its label map."""
    bundle, rng = bundle_of("samed"), np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (70, 50)).astype(np.uint16)
    head = b"P5 # from a scanner\n50 70\n# 12 bits\n4095\n"
    (tmp_path / "a.pgm").write_bytes(head + pixels.astype(">u2").tobytes())
    options = ("-o", tmp_path / "labels.pgm", "--intensity-window", "100,3000")
    done = run(examples / "segment", bundle, tmp_path / "a.pgm", *options)
    assert done.returncode == 0, done.stderr.decode()
    with load(bundle) as session:
        expected = session.segment(session.encode(pixels, intensity_window=(100, 3000))).labels
    differing = np.asarray(Image.open(tmp_path / "labels.pgm")) != expected
    assert differing.sum() <= 1


PICTURES = {
    "empty": b"",
    "another kind": b"P2\n2 2\n255\n1 2 3 4",
    "no numbers": b"P5\nx",
    "huge": b"P5\n999999999 999999999\n255\nab",
    "endless": b"P5\n99999999999999999999999 1\n255\nab",
    "no size": b"P5\n0 3\n255\nabc",
    "cut off": b"P6\n2 2\n255\nabcdefg",
    "maximum": b"P5\n1 1\n70000\nab",
    "flat": b"P5\n2 2\n255\naaaa",
    "comment": b"P5 #" + b"x" * 5000,
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_pictures(examples: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pgm").write_bytes(PICTURES[name])
    words = (bundle, tmp_path / "a.pgm", "-o", tmp_path / "b.pgm", "--point", "0,0")
    done = run(examples / "segment", *words)
    assert done.returncode == 2, done.stderr.decode()
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "b.pgm").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a bundle"),
        (["-o"], "-o has no value"),
        (["--colour", "red"], "unknown option --colour"),
        (["--point", "1"], "is not 2 to 3 numbers"),
        (["--point", "1,2,"], "is not 2 to 3 numbers"),
        (["--point", "1,2,5"], "another label"),
        (["--point", ""], "is not 2 to 3 numbers"),
        (["--box", "1,2,3,x"], "is not 4 numbers"),
        (["--threads", "-3"], "is not a whole number"),
        (["BUNDLE", "none.pgm", "-o", "b.pgm"], "none.pgm cannot be opened"),
        (["BUNDLE", "IMAGE", "-o", "b.pgm"], "a prompt set is empty"),
        (["BUNDLE", "IMAGE", "-o", "no/such/b.pgm", "--point", "1,1"], "cannot be written"),
        (["BUNDLE", "IMAGE", "-o", "b.pgm", "--point", "1e9,1"], "lies outside"),
        (["none", "IMAGE", "-o", "b.pgm", "--point", "1,1"], "none is not a folder"),
    ],
    ids=str,
)
def test_bad_words(
    examples: Path, bundle: Path, picture, words: list[str], message: str, tmp_path: Path
) -> None:
    named = {"BUNDLE": bundle, "IMAGE": picture[0]}
    done = run(examples / "segment", *(named.get(word, word) for word in words))
    assert (done.returncode, message in done.stderr.decode()) == (2, True), done.stderr.decode()


def test_hostile_bundles(examples: Path, bundle: Path, picture, tmp_path: Path) -> None:
    words = (picture[0], "-o", tmp_path / "b.pgm", "--point", "1,1")
    changes: list[dict[str, Any]] = [
        {"network__image_size": 16384, "network__embedding_size": 4096},
        {"files": [{"path": "x" * 10**6}]},
        {"conventions__class_names": ["\x1b[31m"] * 3},
        {"graphs": {}},
    ]
    copy = copied(bundle, tmp_path)
    original = (copy / "manifest.json").read_text()
    for change in changes:
        (copy / "manifest.json").write_text(original)
        edit_manifest(copy, **change)
        done = run(examples / "segment", copy, *words)
        assert done.returncode == 2, done.stderr.decode()
        assert b"\x1b" not in done.stderr
        assert len(done.stderr) < 2000
    done = run(examples / "segment", bundle, *words, MEDSA_ONNXRUNTIME="/no/such.so")
    assert (done.returncode, b"cannot be opened" in done.stderr) == (2, True)


def test_stream(examples: Path, bundle: Path) -> None:
    """Three frames, of which the second is flat, then the end in the middle of a frame."""
    frames = [seeded_image(64, seed)[:48, :, 0] for seed in (1, 2, 3)]
    frames[1] = np.full_like(frames[1], 9)
    words = (bundle, "--size", "64x48", "--box", "5,5,50,40", "--report", "yes")
    data = b"".join(frame.tobytes() for frame in frames)
    done = run(examples / "stream", *words, data=data)
    assert done.returncode == 0, done.stderr.decode()
    masks = np.frombuffer(done.stdout, np.uint8).reshape(3, 48, 64)
    with load(bundle) as session:
        for frame, mask in zip(frames, masks, strict=True):
            if frame.min() == frame.max():
                assert not mask.any()
                continue
            expected = session.segment(session.encode(frame), box=(5, 5, 50, 40)).mask
            assert np.array_equal(mask, expected * np.uint8(255))
    assert done.stderr.decode().count("frame ") == 3
    done = run(examples / "stream", *words, data=data[:-1])
    assert (done.returncode, b"frame 2 is cut off" in done.stderr) == (2, True)
    assert len(done.stdout) == 2 * 48 * 64
    for bad in (["--size", "0x3"], ["--size", "64"], ["--size", "64x48", "--type", "u9"]):
        assert run(examples / "stream", bundle, *bad).returncode == 2
