"""Bills of materials: CycloneDX's own schema takes them, and they list what is in a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call, copied, start
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from medsa_deploy.bundle import sbom
from medsa_deploy.bundle.files import check_files, sha256
from medsa_deploy.bundle.manifest import load_manifest, save_manifest
from medsa_deploy.errors import BundleError


def validated(path: Path) -> dict[str, Any]:
    """A bill of materials, after CycloneDX's schema has accepted it."""
    text = path.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document: dict[str, Any] = json.loads(text)
    return document


def by_name(document: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in document["components"] if c["type"] == kind}


def properties(component: dict[str, Any]) -> dict[str, str]:
    entries = component.get("properties", ())
    return {p["name"].removeprefix("medsa-deploy:"): p["value"] for p in entries}


def hash_of(component: dict[str, Any]) -> str:
    (entry,) = component["hashes"]
    assert entry["alg"] == "SHA-256"
    content: str = entry["content"]
    return content


def test_a_bundle_lists_its_checkpoint_files_and_libraries(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    check_files(manifest, bundle)
    document = validated(bundle / "sbom.json")
    files, tools = by_name(document, "file"), by_name(document, "library")
    assert hash_of(files[manifest.source.checkpoint]) == manifest.source.sha256
    for file in manifest.files:
        if file.role != "sbom":
            assert hash_of(files[file.path]) == sha256(bundle / file.path)
            assert properties(files[file.path])["role"] == file.role
    assert {name: tools[name]["version"] for name in ("torch", "onnx", "medsa-deploy")} == {
        name: manifest.tools[name] for name in ("torch", "onnx", "medsa-deploy")
    }
    assert tools["onnx"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert all("licenses" in tool for name, tool in tools.items() if name != "segment-anything")


def test_quantize_keeps_the_bill_current(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    done = call("quantize", copy, "--fp16")
    assert done.code == 0, done.err
    manifest = load_manifest(copy)
    check_files(manifest, copy)
    document = validated(copy / "sbom.json")
    half = by_name(document, "file")["encoder.fp16.onnx"]
    assert hash_of(half) == manifest.file("encoder", "fp16").sha256
    assert [a["name"] for a in half["pedigree"]["ancestors"]] == ["encoder.onnx"]
    assert "nodes in float32: softmax" in half["pedigree"]["notes"]
    tools = by_name(document, "library")
    assert properties(tools["onnx"]) == {"used-by:export": "true", "used-by:quantize": "true"}
    assert properties(tools["torch"]) == {"used-by:export": "true"}


def test_a_bundle_without_a_bill_loads_and_gets_one_from_quantize(
    bundle: Path, tmp_path: Path
) -> None:
    copy = copied(bundle, tmp_path)
    manifest = load_manifest(copy)
    files = tuple(file for file in manifest.files if file.role != "sbom")
    save_manifest(dataclasses.replace(manifest, files=files), copy)
    (copy / "sbom.json").unlink()
    done = call("verify", copy)
    assert done.code == 0, done.err
    manifest = dataclasses.replace(manifest, files=files)
    listing = sbom.write_sbom(copy, manifest, ["numpy"], command="quantize")
    assert [file.role for file in listing.files].count("sbom") == 1
    assert "encoder.onnx" in by_name(validated(copy / "sbom.json"), "file")


def test_an_earlier_bill_that_is_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "sbom.json"
    earlier.write_text('{"components": 3}')
    with pytest.raises(BundleError, match=r"sbom\.json cannot be read .*: export"):
        sbom.write_sbom(tmp_path, load_manifest(bundle), (), command="quantize", earlier=earlier)


def test_without_the_library_nothing_is_written(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    done = start("quantize", copy, "--fp16", without=("cyclonedx",))
    assert done.code == 2
    assert "needs cyclonedx-python-lib, which is not installed: pip install" in done.error
    assert "medsa-deploy[quantize]" in done.error
    assert start("verify", copy, without=("cyclonedx",)).code == 0
