"""`engine.json`, and what keeps an engine from being loaded: named, fast, before a byte is read."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy import errors
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import Manifest, Tensor, load_manifest
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.engines import (
    AxisRange,
    Engine,
    EngineFile,
    EngineOptions,
    check_loadable,
    find_engines,
    load_engines,
    optimization_profile,
    save_engines,
    stale_role,
)

LIBRARY = tensorrt_api.Library(flavor="rtx", version="1.7.1", targets=("sm86", "sm89"))
DEVICE = cuda.Device(name="RTX 3090", capability="sm86", driver_cuda="13.0")
SINGLE = AxisRange(min=1, opt=1, max=1)
OPTIONS = EngineOptions(
    flavor="rtx",
    precision="fp32",
    targets=("sm86", "sm89"),
    batch=SINGLE,
    points=SINGLE,
    prompts=SINGLE,
    embeddings=SINGLE,
    tf32=True,
    fused_attention=True,
    workspace_gb=None,
    optimization_level=None,
)


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    """Engines of a few bytes, rightly described."""
    folder = tmp_path / "x.medsa" / "engines" / "rtx-fp32-sm86+sm89"
    folder.mkdir(parents=True)
    files = []
    for role in ("encoder", "decoder"):
        path = folder / f"{role}.engine"
        path.write_bytes(b"native code: " + role.encode())
        files.append(
            EngineFile(
                role=role,
                path=path.name,
                bytes=path.stat().st_size,
                sha256=sha256(path),
                sources={manifest.file(role).path: manifest.file(role).sha256},
                profile=optimization_profile(manifest.graphs[role].inputs, OPTIONS),
                attention="plain",
                seconds=1.5,
            )
        )
    described = Engine(
        options=OPTIONS, version="1.7.1", device=None, state="built", files=tuple(files)
    )
    save_engines(described, folder)
    return folder


def check(folder: Path, manifest: Manifest, library=LIBRARY, device=DEVICE) -> Engine:
    return check_loadable(folder, manifest, library=library, device=device)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_engine_that_fits_is_loadable(folder: Path, manifest: Manifest) -> None:
    engine = check(folder, manifest)
    assert engine.options == OPTIONS
    assert engine.file("decoder").path == "decoder.engine"
    assert check(folder, manifest, device=replace(DEVICE, capability="sm89")) == engine


@pytest.mark.parametrize(
    ("library", "device", "error", "message"),
    [
        (
            tensorrt_api.Library(flavor="tensorrt", version="10.13", targets=()),
            DEVICE,
            errors.EngineFlavorError,
            "holds TensorRT-RTX engines; TensorRT is to load them: build them with medsa-deploy "
            "build-engine BUNDLE --fp32 --flavor tensorrt",
        ),
        (
            replace(LIBRARY, version="1.8.0"),
            DEVICE,
            errors.EngineVersionError,
            "was built by TensorRT-RTX 1.7.1; 1.8.0 is installed",
        ),
        (LIBRARY, None, errors.EngineDeviceError, "no NVIDIA driver or GPU was found"),
        (
            LIBRARY,
            replace(DEVICE, name="RTX 5090", capability="sm120"),
            errors.EngineDeviceError,
            "was built for sm86, sm89; this machine's RTX 5090 is sm120: build them with "
            "medsa-deploy build-engine BUNDLE --fp32 --flavor rtx --target sm120",
        ),
    ],
    ids=["flavor", "version", "driver", "capability"],
)
def test_what_does_not_fit_is_named_without_reading_the_engines(
    folder: Path, manifest: Manifest, library, device, error, message: str
) -> None:
    for path in folder.glob("*.engine"):
        path.unlink()
    with pytest.raises(error) as caught:
        check(folder, manifest, library, device)
    assert message.replace("BUNDLE", str(folder.parent.parent)) in str(caught.value)
    assert isinstance(caught.value, errors.EngineError)
    assert caught.value.exit_code == 2


def test_engines_that_another_model_built_are_worth_a_warning(
    folder: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    for device in (None, DEVICE.name):
        edit(folder, device=device)
        check(folder, manifest)
    assert caplog.text == ""
    edit(folder, device="RTX A2000")
    assert check(folder, manifest).device == "RTX A2000"
    assert "was built on RTX A2000, and this machine's GPU is RTX 3090, of the same" in caplog.text
    assert "build them with medsa-deploy build-engine" in caplog.text


def test_engines_are_found_by_flavor_precision_and_gpu(folder: Path) -> None:
    bundle = folder.parent.parent
    for targets in (("sm89",), ("sm80", "sm86", "sm89")):
        other = folder.with_name(f"rtx-fp32-{'+'.join(targets)}")
        other.mkdir()
        described = load_engines(folder)
        save_engines(replace(described, options=replace(described.options, targets=targets)), other)
    assert find_engines(bundle, "rtx", "fp32", DEVICE) == folder
    sm89 = replace(DEVICE, capability="sm89")
    assert find_engines(bundle, "rtx", "fp32", sm89).name == "rtx-fp32-sm89"
    for device in (None, replace(DEVICE, capability="sm120")):  # check_loadable says what is wrong
        assert find_engines(bundle, "rtx", "fp32", device).name == "rtx-fp32-sm89"
    with pytest.raises(errors.EngineError, match=r"no TensorRT-RTX fp16 engines: .* --target sm86"):
        find_engines(bundle, "rtx", "fp16", DEVICE)
    with pytest.raises(errors.EngineError, match=r"--fp32 --flavor tensorrt$"):
        find_engines(bundle, "tensorrt", "fp32", DEVICE)


def test_an_engine_of_another_graph_is_stale(folder: Path, manifest: Manifest) -> None:
    files = tuple(
        replace(f, sha256="0" * 64) if f.path == "decoder.onnx" else f for f in manifest.files
    )
    with pytest.raises(errors.EngineStaleError, match=r"its decoder was built from another decod"):
        check(folder, replace(manifest, files=files))
    assert stale_role(load_engines(folder), replace(manifest, files=())) == "encoder"


@pytest.mark.parametrize("change", ["bit", "longer", "gone"])
def test_changed_engines_are_refused(folder: Path, manifest: Manifest, change: str) -> None:
    path = folder / "decoder.engine"
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(content + b"!" if change == "longer" else b"N" + content[1:])
    reason = {"bit": "another SHA-256", "longer": "expected 20", "gone": "No such file"}[change]
    with pytest.raises(errors.EngineChangedError, match=reason):
        check(folder, manifest)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", errors.EngineChangedError, "cannot be read"),
        ("[]", errors.EngineVersionError, "schema"),
        ('{"schema": 2}', errors.EngineVersionError, "schema"),
        ('{"schema": 1}', errors.EngineChangedError, "lacks fields"),
        (None, errors.EngineChangedError, "cannot be read"),
    ],
)
def test_a_damaged_description_is_refused(
    folder: Path, manifest: Manifest, text: str | None, error, message: str
) -> None:
    path = folder / "engine.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        check(folder, manifest)
    assert "build the engines again" in str(caught.value)


def test_a_description_cannot_name_files_elsewhere(folder: Path, manifest: Manifest) -> None:
    data = json.loads((folder / "engine.json").read_text())
    data["files"][0]["path"] = "../../encoder.onnx"
    edit(folder, files=data["files"])
    with pytest.raises(errors.EngineChangedError, match=r"\.\./\.\./encoder.onnx"):
        check(folder, manifest)
    edit(folder, files=data["files"][1:])
    with pytest.raises(errors.EngineChangedError, match="expected an encoder and a decoder"):
        check(folder, manifest)


def test_a_large_engine_is_refused_in_under_a_second(folder: Path, manifest: Manifest) -> None:
    """A ViT-B's is 400 MB: what is cheap to compare comes first, and its bytes last."""
    size = 400_000_000
    with (folder / "encoder.engine").open("wb") as f:
        f.truncate(size)
    data = json.loads((folder / "engine.json").read_text())
    data["files"][0]["bytes"] = size
    edit(folder, files=data["files"])
    start = time.perf_counter()
    with pytest.raises(errors.EngineVersionError):
        check(folder, manifest, replace(LIBRARY, version="2.0"))
    with pytest.raises(errors.EngineDeviceError):
        check(folder, manifest, device=None)
    assert time.perf_counter() - start < 0.5
    with pytest.raises(errors.EngineChangedError, match="another SHA-256"):
        check(folder, manifest)


def test_a_description_that_cannot_be_written_leaves_the_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    engine = load_engines(folder)

    def write_half(path: Path, data: bytes) -> None:
        with path.open("wb") as f:
            f.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        save_engines(replace(engine, state="verified"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


sizes = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(sorted)
ranges = sizes.map(lambda s: AxisRange(min=s[0], opt=s[1], max=s[2]))


@given(batch=ranges, points=ranges, prompts=ranges, embeddings=ranges)
def test_profiles_have_the_ranges_on_their_axes(batch, points, prompts, embeddings) -> None:
    options = replace(OPTIONS, batch=batch, points=points, prompts=prompts, embeddings=embeddings)
    inputs = (
        Tensor(name="image", dtype="float32", shape=("B", 3, 64, 64)),
        Tensor(name="image_embeddings", dtype="float32", shape=("E", 256, 4, 4)),
        Tensor(name="point_coords", dtype="float32", shape=("P", "N", 2)),
        Tensor(name="has_mask_input", dtype="float32", shape=(1,)),
    )
    profile = optimization_profile(inputs, options)
    for i, size in enumerate(("min", "opt", "max")):
        b, n, p, e = (getattr(r, size) for r in (batch, points, prompts, embeddings))
        assert [shapes[i] for shapes in profile.values()] == [
            (b, 3, 64, 64),
            (e, 256, 4, 4),
            (p, n, 2),
            (1,),
        ]


@given(
    batch=ranges,
    level=st.none() | st.integers(0, 5),
    workspace=st.none() | st.floats(0.1, 100),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_descriptions_survive_the_file(tmp_path_factory, batch, level, workspace, flags) -> None:
    options = replace(
        OPTIONS,
        batch=batch,
        optimization_level=level,
        workspace_gb=workspace,
        tf32=flags[0],
        fused_attention=flags[1],
    )
    files = tuple(
        EngineFile(
            role=role,
            path=f"{role}.engine",
            bytes=1,
            sha256="0",
            sources={"a.onnx": "1", "a.onnx.data": "2"},
            profile={"x": ((1, 2), (3, 4), (5, 6))},
            attention="unknown",
            seconds=0.25,
        )
        for role in ("encoder", "decoder")
    )
    described = Engine(options=options, version="1", device="X", state="verified", files=files)
    folder = tmp_path_factory.mktemp("engine")
    save_engines(described, folder)
    assert asdict(load_engines(folder)) == asdict(described)
