"""What the C++ runtime refuses, under the sanitizers: bad manifests, files, images and prompts."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import accept_changes, copied, edit_manifest, manifest_data
from cpp_driver import HEADERS, Driver, Refusal

from medsa_deploy import errors, load
from medsa_deploy.bundle import manifest as manifests
from medsa_deploy.transforms import UNPROMPTED, Prompt, prompts

CLASSES = {
    "manifest": manifests.Manifest,
    "network": manifests.Network,
    "conventions": manifests.Conventions,
    "tensor": manifests.Tensor,
    "graph": manifests.GraphContract,
    "file": manifests.File,
}


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 255, (60, 80), np.uint8)


@pytest.fixture
def opened(driver: Driver, bundle: Path) -> Driver:
    driver.open(bundle)
    return driver


def assert_refused(error: Refusal, kind: type[errors.MedsaError]) -> None:
    assert (error.name, error.code) == (kind.__name__, kind.exit_code)


def test_fields_are_those_of_python() -> None:
    """A field that Python learns must be read here, or it would change masks unseen."""
    text = (HEADERS / "medsa" / "manifest.hpp").read_text()
    for name, cls in CLASSES.items():
        (listed,) = re.findall(rf"{name}_fields = \{{(.*?)\}};", text, flags=re.DOTALL)
        known = set(re.findall(r'"(\w+)"', listed)) - ({"digest"} if name == "manifest" else set())
        assert known == {f.name for f in fields(cls)}, name


def test_codes_are_those_of_python() -> None:
    text = (HEADERS / "medsa" / "errors.hpp").read_text()
    names = re.findall(r'case Code::\w+: return "(\w+)"', text)
    assert len(names) == 7
    device = {"DeviceError", "DeviceMemoryError"}
    for name in names:
        assert getattr(errors, name).exit_code == (3 if name in device else 2), name


def give_manifest(driver: Driver, text: bytes) -> None:
    driver.ask(f"manifest {len(text)}", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b"[" * 100_000, "nested more than 64"),
        (b'{"schema": 2, "schema": 2}', "'schema' twice"),
        (b'{"schema": NaN}', "no value"),
        (b'{"schema": 1e999}', "beyond the range"),
        (b'{"schema": 02}', "no value"),
        (b'{"schema": "\xff"}', "invalid UTF-8"),
        (b'{"schema": "\xed\xa0\x80"}', "invalid UTF-8"),
        (b'{"schema": "\\ud800"}', "half a surrogate pair"),
        (b'{"schema": "a', "without an end"),
        (b'{"schema": "\n"}', "control character"),
        (b'{"schema": 2} x', "text after the end"),
        (b"[]", "no schema version"),
        (b'{"schema": 3}', "another schema version"),
        (b'{"schema": 2.0}', "another schema version"),
        (b'{"schema": 99999999999999999999}', "another schema version"),
        (b'{"schema": 2}', "lacks the field 'network'"),
        (b'{"schema": 2, "rooms": 1}', "unknown field 'rooms'"),
    ],
)
def test_texts(driver: Driver, text: bytes, words: str) -> None:
    with pytest.raises(Refusal, match=words) as caught:
        give_manifest(driver, text)
    assert_refused(caught.value, errors.BundleError)


@pytest.mark.parametrize(
    "change",
    [
        {"network__image_size": -1},
        {"network__image_size": 2**31},
        {"network__image_size": 256.5},
        {"network__embedding_size": 4096},
        {"network__classes": 0},
        {"network__classes": 7},
        {"network__outputs": "masks"},
        {"network__depth_chunk": 10**6},
        {"network__layers": 3},
        {"conventions__preprocess": "fancy"},
        {"conventions__threshold": 1},
        {"conventions__threshold": "0.5"},
        {"conventions__point_scale": 1e300},
        {"conventions__pad_points": -1},
        {"conventions__intensity_window": [5, 5]},
        {"conventions__intensity_window": [1]},
        {"conventions__class_names": ["a", "b", "c"]},
        {"conventions__class_names": [1]},
        {"files__0__path": "../encoder.onnx"},
        {"files__0__path": "/etc/passwd"},
        {"files__0__path": "a\x00b"},
        {"files__0__bytes": -5},
        {"graphs__encoder": {"inputs": [], "outputs": []}},
        {"graphs__decoder": 1},
    ],
    ids=str,
)
def test_values(driver: Driver, bundle: Path, change: dict[str, Any], tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, **change)
    with pytest.raises(Refusal) as caught:
        driver.open(copy)
    assert_refused(caught.value, errors.BundleError)


def test_damaged_manifests_never_crash(driver: Driver, bundle: Path) -> None:
    """Random bytes and cuts: read or refused, and a digest finds every change."""
    data = manifest_data(bundle)
    text, rng = json.dumps(data).encode(), np.random.default_rng(8)
    give_manifest(driver, text)
    zeroed = json.dumps({**data, "digest": "0" * 64})
    digest = hashlib.sha256(zeroed.encode()).hexdigest()
    sealed = zeroed.replace("0" * 64, digest).encode()
    give_manifest(driver, sealed)
    for i in range(300):
        damaged = bytearray(sealed if i % 2 else text)
        for _ in range(int(rng.integers(1, 4))):
            damaged[rng.integers(len(damaged))] = rng.choice(list(b'{}[],:"0 9-e\\\xff'))
        if i % 5 == 0:
            del damaged[rng.integers(len(damaged)) :]
        try:
            give_manifest(driver, bytes(damaged))
        except Refusal as e:
            assert_refused(e, errors.BundleError)
        else:
            assert i % 2 == 0 or bytes(damaged) == sealed


def test_bundles_of_the_package_are_read(driver: Driver, bundle: Path) -> None:
    text = manifests.manifest_to_json(manifests.load_manifest(bundle)).encode()
    give_manifest(driver, text)
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    driver.open(bundle, sha256=digest)
    with pytest.raises(Refusal, match="not the manifest that was expected"):
        driver.open(bundle, sha256="0" * 64)


def test_files(driver: Driver, bundle: Path, tmp_path: Path) -> None:
    def refusal(words: str, **options: Any) -> None:
        with pytest.raises(Refusal, match=words) as caught:
            driver.open(copy, **options)
        assert_refused(caught.value, errors.BundleError)

    copy = tmp_path / "none"
    refusal("is not a folder")
    copy.mkdir()
    refusal("no manifest.json")
    copy = copied(bundle, tmp_path)
    refusal("no encoder in fp16", precision="fp16")
    click = copy / "decoder-click.onnx"
    content = click.read_bytes()
    click.write_bytes(content[:-1] + b"\x00")
    refusal("SHA-256 differs")
    click.write_bytes(content[: len(content) // 2])
    refusal("bytes, expected")
    accept_changes(copy)
    refusal("is not a graph ONNX Runtime")
    click.write_bytes((copy / "decoder.onnx").read_bytes())
    accept_changes(copy)
    refusal("is not the graph its manifest describes: .*mask_input is float32 .*absent")
    click.unlink()
    refusal("lacks 'decoder-click.onnx'")
    click.symlink_to(bundle / "decoder-click.onnx")
    refusal("outside the bundle")


def test_a_library_that_is_none(sanitized_program: Path, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "libonnxruntime.so"
    other.write_bytes(b"none")
    for path, words in ((other, "cannot be opened"), ("libm.so.6", "no function OrtGetApiBase")):
        with (
            Driver(sanitized_program, MEDSA_ONNXRUNTIME=str(path)) as driver,
            pytest.raises(Refusal, match=words) as caught,
        ):
            driver.open(bundle)
        assert_refused(caught.value, errors.MissingDependencyError)


@pytest.mark.parametrize(
    ("pixels", "window"),
    [
        (np.zeros((8, 8), np.uint8), None),
        (np.full((8, 8, 3), 7, np.uint16), None),
        (np.array([[1, np.nan]], np.float32), None),
        (np.array([[1, np.inf]], np.float32), None),
        (np.array([[1, 2]], np.float32), (5.0, 9.0)),
        (np.array([[1, 2]], np.uint16), (9.0, 5.0)),
        (np.array([[1, 2]], np.uint16), (0.0, float("inf"))),
    ],
    ids=str,
)
def test_images(opened: Driver, bundle: Path, pixels: np.ndarray, window: Any) -> None:
    with load(bundle, threads=1) as session, pytest.raises(errors.MedsaError) as expected:
        session.encode(pixels, intensity_window=window)
    with pytest.raises(Refusal) as caught:
        opened.encode(pixels, window=window)
    assert_refused(caught.value, type(expected.value))


BOX, NONE = (5.0, 5.0, 40.0, 40.0), np.zeros((0, 2))
BAD_PROMPTS: dict[str, dict[str, Any]] = {
    "right of the image": {"points": [(80, 5)]},
    "left of the image": {"points": [(-1, 5)]},
    "NaN": {"points": [(np.nan, 5)]},
    "label 2": {"points": [(3, 5)], "labels": [2]},
    "empty box": {"box": (5, 5, 5, 9)},
    "inverted box": {"box": (9, 5, 5, 9)},
    "box outside": {"box": (5, 5, 81, 9)},
    "infinite box": {"box": (5, 5, np.inf, 9)},
    "small mask": {"mask": np.zeros((8, 8))},
    "NaN mask": {"mask": np.full((64, 64), np.nan)},
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_prompts(opened: Driver, bundle: Path, image: np.ndarray, name: str) -> None:
    sets = prompts(**BAD_PROMPTS[name])
    with load(bundle, threads=1) as session:
        embedding = session.encode(image)
        with pytest.raises(errors.PromptError):
            session.segment_sets(embedding, sets)
    opened.encode(image)
    with pytest.raises(Refusal) as caught:
        opened.segment(sets)
    assert_refused(caught.value, errors.PromptError)


def test_calls(opened: Driver, image: np.ndarray, bundle_3d: Path) -> None:
    box = Prompt(points=NONE, labels=np.zeros(0), box=np.float32(BOX), mask=None)
    opened.encode(image)
    for sets in ([], [UNPROMPTED], [box, UNPROMPTED]):
        with pytest.raises(Refusal, match="a prompt set is empty") as caught:
            opened.segment(sets)
        assert_refused(caught.value, errors.PromptError)
    for options in ({"multimask": True}, {"threshold": 1.5}, {"threshold": float("nan")}):
        with pytest.raises(Refusal) as caught:
            opened.segment([box], **options)
        assert_refused(caught.value, errors.UsageError)
    opened.open(bundle_3d)
    with pytest.raises(Refusal, match="4 neighbouring slices") as caught:
        opened.encode(image)
    assert_refused(caught.value, errors.UsageError)
    with pytest.raises(Refusal, match="a multiple of 4"):
        opened.encode(image, image, slices=True)
    with pytest.raises(Refusal, match="different sizes"):
        opened.encode(image, image, image, image[:30], slices=True)
    with pytest.raises(Refusal, match="threads is 5000"):
        opened.open(bundle_3d, threads=5000)
