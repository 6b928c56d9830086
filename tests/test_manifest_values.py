"""Flipped bits, repeated keys and impossible values of manifest.json: refused, in words."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_manifest import at, document, full, named, paths

from medsa_deploy.bundle import manifest as manifests
from medsa_deploy.bundle.manifest import (
    Manifest,
    load_manifest,
    manifest_from_json,
    manifest_to_json,
    save_manifest,
)
from medsa_deploy.bundle.manifest_values import RANGES, check_values
from medsa_deploy.errors import BundleError, MedsaError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the manifest of `full`."""
    save_manifest(full(), tmp_path)
    return tmp_path


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def load_bytes(folder: Path, content: bytes) -> Manifest:
    (folder / "manifest.json").write_bytes(content)
    return load_manifest(folder)


def loaded_flips(folder: Path, bits: range) -> list[int]:
    """The bits whose flip does not keep the manifest from loading."""
    content = manifest_to_json(full()).encode()
    loaded = []
    for bit in bits:
        try:
            load_bytes(folder, flipped(content, bit))
        except BundleError:
            continue
        loaded.append(bit)
    return loaded


def test_a_flipped_bit_is_refused(folder: Path) -> None:
    """Every 151st bit, and every bit of the digest's own line."""
    bits = 8 * len((folder / "manifest.json").read_bytes())
    assert bits > 30_000
    assert loaded_flips(folder, range(0, bits, 151)) == []
    assert loaded_flips(folder, range(bits - 8 * 80, bits)) == []


@pytest.mark.slow
def test_every_flipped_bit_is_refused(folder: Path) -> None:
    bits = 8 * len((folder / "manifest.json").read_bytes())
    assert loaded_flips(folder, range(bits)) == []


@pytest.mark.parametrize("length", [0, 1, 100, -100, -1])
def test_a_truncated_manifest_is_refused(folder: Path, length: int) -> None:
    content = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError):
        load_bytes(folder, content[:length])


def test_a_manifest_that_is_no_text_or_too_long_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        load_bytes(folder, b"\xff\xfe")
    monkeypatch.setattr(manifests, "MOST_BYTES", 100)
    with pytest.raises(BundleError, match="more than 100 bytes"):
        load_bytes(folder, b" " * 101)


def test_a_manifest_without_a_digest_loads_and_a_wrong_digest_is_named(folder: Path) -> None:
    assert load_bytes(folder, json.dumps(document()).encode()) == full()
    data: Any = json.loads(manifest_to_json(full()))
    data["conventions"]["threshold"] = 0.75
    with pytest.raises(BundleError, match="not as it was written: its digest differs; copy the"):
        load_bytes(folder, json.dumps(data, indent=2).encode())
    for digest in (None, 5, "", "0" * 64, ["x"]):
        with pytest.raises(BundleError, match="its digest differs"):
            load_bytes(folder, json.dumps(document() | {"digest": digest}).encode())


@pytest.mark.parametrize(
    ("field", "again"),
    [
        ('"threshold": 0.25,', '"threshold": 0.75,'),
        ('"schema": 2', '"schema": 2,'),
        ('"torch": "2.13.0"', '"torch": "2.13.0",'),
    ],
)
def test_a_repeated_key_is_named(folder: Path, field: str, again: str) -> None:
    text = json.dumps(document())
    assert field in text
    doubled = f"{field.rstrip(',')}, {field}" if again.endswith(",") else field
    key = field.split(":")[0].strip('"')
    with pytest.raises(BundleError, match=f"the key '{key}' is there twice"):
        load_bytes(folder, text.replace(field, doubled).encode())


def test_every_number_has_a_range() -> None:
    """Fields of the dataclasses that may hold a number, against the table."""
    numbers = set()
    todo: list[Any] = [("Manifest", "", Manifest)]
    done: set[type] = set()
    while todo:
        owner, field, hint = todo.pop()
        if dataclasses.is_dataclass(hint):
            if hint not in done:
                done.add(typing.cast(type, hint))
                hints = typing.get_type_hints(hint)
                todo += [(hint.__name__, name, inner) for name, inner in hints.items()]
        elif hint in (int, float):
            numbers.add((owner, field))
        elif typing.get_origin(hint) is not typing.Literal:
            todo += [(owner, field, inner) for inner in typing.get_args(hint)]
    assert numbers == set(RANGES)


HOSTILE = (0, -1, 2**63, 10**400, 0.0, 1e308, "\x1b[31m", "\ud800", "x" * 2000, "../../etc/passwd")
LEAVES = [p for p in paths(document()) if not isinstance(at(document(), p)[p[-1]], dict | list)]


@pytest.mark.parametrize("path", LEAVES, ids=named)
def test_a_hostile_value_is_refused_or_within_its_range(path: tuple) -> None:
    data = document()
    for value in HOSTILE:
        at(data, path)[path[-1]] = value
        message = ""
        try:
            check_values(manifest_from_json(json.dumps(data)))
        except BundleError as e:
            message = str(e)
        assert "\x1b" not in message
        assert len(message) < 400


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            ("network", "image_size"),
            -1,
            "image_size is -1, expected a whole number from 1 to",
        ),
        (("network", "classes"), 2**63, "classes is 9223372036854775808, expected a whole number"),
        (
            ("conventions", "threshold"),
            1,
            "threshold is 1.0, expected a number above 0 and",
        ),
        (("conventions", "threshold"), 0, "threshold is 0.0, expected a number"),
        (("conventions", "intensity_window"), [250, -175], "expected a low and a higher intensity"),
        (("conventions", "class_names"), ["liver"], "expected the names of 2 classes, or none"),
        (("conventions", "class_names", 0), "a\nb", "expected printable characters"),
        (("network", "image_size"), 512, "image is ('batch', 3, 256, 256), expected a shape that"),
        (("network", "classes"), 3, "class_names is ('Leber', 'rein gauche é'), expected the"),
        (("network", "embedding_size"), 8, "image_embeddings is ('batch', 256, 16, 16), expected"),
        (("network", "outputs"), "labels", "low_res_masks is ('P', 2, 64, 64), expected a shape"),
        (("graphs",), {}, "graphs is [], expected the graph encoder"),
        (("graphs", "decoder", "outputs"), [], "outputs is [], expected one tensor low_res_masks"),
        (("files", 0, "path"), "../encoder.onnx", "expected a path inside the bundle"),
        (("files", 0, "path"), ".git/config", "expected a path inside the bundle"),
        (("files", 0, "path"), "C:\\x", "expected a path inside the bundle"),
        (("files", 0, "sha256"), "C" * 64, "expected 64 hexadecimal digits"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, path: tuple, value: object, words: str) -> None:
    data = document()
    at(data, path)[path[-1]] = value
    with pytest.raises(BundleError) as refusal:
        load_bytes(folder, json.dumps(data).encode())
    assert words in str(refusal.value)
    assert "copy the bundle again or export it again" in str(refusal.value)


def test_one_path_has_one_hash(folder: Path) -> None:
    data = document()
    data["files"].append(data["files"][0] | {"role": "decoder", "sha256": "d" * 64})
    with pytest.raises(BundleError, match="expected one SHA-256 for each path"):
        load_bytes(folder, json.dumps(data).encode())


def test_hostile_values_of_a_real_bundle_raise_errors_of_the_tree(
    bundle: Path, tmp_path: Path, bad_manifest: Callable[..., Any]
) -> None:
    """What passes the manifest's checks is opened and run: a mask, or an error of the tree."""
    from medsa_deploy import load

    document = bad_manifest(bundle)
    image = np.random.default_rng(0).integers(0, 255, (64, 80), np.uint8)
    opened = 0
    for path in paths(document):
        if path[0] not in ("network", "conventions", "graphs", "files"):
            continue
        for value in (0, -1, 3, 2**63, 0.5, "x"):
            data = bad_manifest(bundle)
            at(data, path)[path[-1]] = value
            (tmp_path / "manifest.json").write_text(json.dumps(data))
            try:
                load_manifest(tmp_path)
            except BundleError:
                continue
            try:
                with load(tmp_path, threads=1) as session:
                    embedding = session.encode(image)
                    session.segment(embedding, points=[(30, 30)])
                    opened += 1
            except MedsaError:
                continue
    assert opened > 20


@pytest.fixture
def bad_manifest(bundle: Path, tmp_path: Path) -> Callable[[Path], Any]:
    """A bundle's files linked into `tmp_path`, and a function that gives its manifest to edit."""
    from command_line import manifest_data

    for file in bundle.iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).hardlink_to(file)
    return manifest_data
