"""manifest.json ⇄ dataclasses, read strictly; a bundle's files against what it says of them."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.bundle.files import check_file, check_files, describe_file
from medsa_deploy.bundle.manifest import (
    MANIFEST_FILENAME,
    MANIFEST_SCHEMA,
    Conventions,
    File,
    GraphContract,
    Manifest,
    Network,
    Parity,
    Source,
    Tensor,
    TensorParity,
    load_manifest,
    manifest_from_json,
    manifest_to_json,
    save_manifest,
)
from medsa_deploy.bundle.recipe import Calibration, Island, Recipe
from medsa_deploy.errors import BundleError

st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
OPTIONAL = dict.fromkeys(("mask_dice_mean", "mask_dice_worst", "nan_count"), ...)
FLAT = st.builds(Parity, **OPTIONAL)
"""Without parities in it."""
st.register_type_strategy(
    Parity,
    st.builds(
        Parity,
        **OPTIONAL,
        split=st.none() | FLAT,
        encoders=st.dictionaries(st.text(max_size=5), FLAT, max_size=2),
    ),
)


def full() -> Manifest:
    """A manifest that fills every field, optional ones too."""
    image = Tensor(name="image", dtype="float32", shape=("batch", 3, 256, 256))
    embedding = Tensor(name="image_embeddings", dtype="float32", shape=("batch", 256, 16, 16))
    coords = Tensor(name="point_coords", dtype="float32", shape=("P", "N", 2))
    masks = Tensor(name="low_res_masks", dtype="float32", shape=("P", 2, 64, 64))
    scores = Tensor(name="iou_predictions", dtype="float32", shape=("P", 2))
    parity = Parity(
        precision="fp32",
        backend="onnxruntime",
        images=3,
        seeded_images=2,
        prompt_sets=9,
        tensors={"low_res_masks": TensorParity(relative_l2=1e-6, max_abs=0.0)},
        mask_pixels_differing=0.0,
        mask_dice_mean=0.999,
        mask_dice_worst=0.99,
        nan_count=1,
    )
    return Manifest(
        source=Source(
            checkpoint="adapters.pth",
            weights="state_dict",
            prefix="module.",
            sha256="a" * 64,
            container="adapters over a base",
            dtype="float16, float32",
            base="sam.pth",
            base_sha256="b" * 64,
        ),
        network=Network(
            family="medsa",
            encoder="vit",
            widths=(96,),
            depths=(4,),
            heads=(4,),
            windows=(14,),
            global_blocks=(1, 3),
            image_size=256,
            embedding_size=16,
            patch_size=16,
            rel_pos="zero",
            adapters=("space", "mlp", "hyp"),
            parameters=1000,
            adapter_parameters=10,
            two_way="meta",
            mask_tokens=4,
            classes=2,
            outputs="classes",
            hyp_lengths=(64, 64),
            hyp_prompt_length=16,
            sd_trans="public",
            depth_chunk=8,
            slices=16,
        ),
        conventions=Conventions(
            preprocess="medsa",
            postprocess="medsam",
            prompts="optional",
            mask_choice="best",
            trained_with="medsam",
            point_order="yx",
            point_frame="image",
            prompt_scope="slice",
            point_scale=0.5,
            pad_points=6,
            intensity_window=(-175.0, 250.0),
            threshold=0.25,
            class_names=("Leber", "rein gauche é"),
        ),
        graphs={
            "encoder": GraphContract(inputs=(image,), outputs=(embedding,)),
            "decoder": GraphContract(inputs=(embedding, coords), outputs=(masks, scores)),
        },
        files=(
            File(
                path="encoder.onnx",
                role="encoder",
                precision="fp32",
                bytes=5,
                sha256="c" * 64,
                opset=20,
            ),
        ),
        parity=(dataclasses.replace(parity, split=parity, encoders={"encoder-openvino": parity}),),
        recipes=(
            Recipe(
                precision="int8",
                target="tensorrt",
                islands=(Island(reason="norms", nodes=34),),
                float32_blocks=("encoder blocks.3",),
                rounded_dice_mean=0.998,
                rounded_dice_worst=0.97,
                quantized=("blocks.0.mlp.0",),
                left_out=("blocks.1.mlp.2",),
                weights="int8, symmetric, per channel",
                activations="int8, symmetric",
                calibration=Calibration(images=32, names_sha256="d" * 64, method="min-max"),
                reference_dice_mean=0.9,
                runs=7,
            ),
        ),
        tools={"torch": "2.13.0"},
    )


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document is, containers first."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def document() -> Any:
    """Without its digest, which would be the first to find a change."""
    data = json.loads(manifest_to_json(full()))
    del data["digest"]
    return data


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """The container that holds what is at `path`."""
    for key in path[:-1]:
        data = data[key]
    return data


def named(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


FREE = [("graphs",), ("tools",), ("tensors",), ("encoders",)]
"""Objects whose keys are names, not fields."""
FIELDS = [p for p in paths(document()) if isinstance(p[-1], str) and p[-2:-1] not in FREE]
REQUIRED = {
    field.name
    for cls in (
        *(
            Source,
            Network,
            Conventions,
            Manifest,
            Tensor,
            GraphContract,
            File,
            Parity,
            TensorParity,
        ),
        *(Recipe, Calibration, Island),
    )
    for field in dataclasses.fields(cls)
    if field.default is field.default_factory is dataclasses.MISSING
}


@pytest.mark.parametrize(
    "cls",
    [
        *(
            Source,
            Network,
            Conventions,
            Tensor,
            GraphContract,
            File,
            TensorParity,
            Parity,
            Manifest,
        ),
        *(Recipe, Calibration, Island),
    ],
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trip(cls: type, data: st.DataObject) -> None:
    """Whatever a dataclass may hold comes back the same."""
    part = data.draw(st.from_type(cls))
    complete = full()
    place: dict[type, Callable[[], Manifest]] = {
        Manifest: lambda: dataclasses.replace(part, schema=MANIFEST_SCHEMA),
        Source: lambda: dataclasses.replace(complete, source=part),
        Network: lambda: dataclasses.replace(complete, network=part),
        Conventions: lambda: dataclasses.replace(complete, conventions=part),
        Tensor: lambda: dataclasses.replace(
            complete, graphs={"g": GraphContract(inputs=(part,), outputs=())}
        ),
        GraphContract: lambda: dataclasses.replace(complete, graphs={"": part}),
        File: lambda: dataclasses.replace(complete, files=(part, part)),
        TensorParity: lambda: dataclasses.replace(
            complete, parity=(dataclasses.replace(complete.parity[0], tensors={"x": part}),)
        ),
        Parity: lambda: dataclasses.replace(complete, parity=(part,)),
        Recipe: lambda: dataclasses.replace(complete, recipes=(part,)),
        Island: lambda: dataclasses.replace(
            complete, recipes=(dataclasses.replace(complete.recipes[0], islands=(part,)),)
        ),
        Calibration: lambda: dataclasses.replace(
            complete, recipes=(dataclasses.replace(complete.recipes[0], calibration=part),)
        ),
    }
    instance = place[cls]()
    assert manifest_from_json(manifest_to_json(instance)) == instance


def test_every_field_is_tried() -> None:
    """What is removed and mistyped below is every field of every dataclass."""
    seen: set[str] = set()
    done: set[Any] = set()
    todo: list[Any] = [Manifest]
    while todo:
        hint = todo.pop()
        todo += typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and hint not in done:
            done.add(hint)  # a parity holds parities
            hints = typing.get_type_hints(hint)
            seen |= hints.keys()
            todo += hints.values()
    assert seen == {path[-1] for path in FIELDS}


@pytest.mark.parametrize(
    "path", [p for p in FIELDS if at(document(), p)[p[-1]] not in (None, {})], ids=named
)
def test_a_missing_field_is_named_or_has_its_default(path: tuple[Any, ...]) -> None:
    data = document()
    del at(data, path)[path[-1]]
    if path == ("schema",):
        with pytest.raises(BundleError, match="has no schema version"):
            manifest_from_json(json.dumps(data))
    elif path[-1] in REQUIRED:
        with pytest.raises(
            BundleError, match=f"lacks fields: {path[-1]}; export the checkpoint again$"
        ):
            manifest_from_json(json.dumps(data))
    else:
        assert manifest_from_json(json.dumps(data)) != full()


@pytest.mark.parametrize("path", list(paths(document())), ids=named)
@pytest.mark.parametrize("wrong", [True, 2.5, {"x": 1}, [[]], None], ids=repr)
def test_a_value_of_the_wrong_type_is_named(path: tuple[Any, ...], wrong: object) -> None:
    data = document()
    right = at(data, path)[path[-1]]
    optional = {"base", "base_sha256", "intensity_window", "opset", "calibration", "pad_points"}
    optional |= {"trained_with"}
    optional |= {"weights", "activations", "sd_trans", "depth_chunk", "slices", "split"}
    optional |= {path[-1] for path in FIELDS if "dice" in path[-1]}
    if (wrong is None and path[-1] in optional) or (wrong == 2.5 and isinstance(right, float)):
        return
    at(data, path)[path[-1]] = wrong
    with pytest.raises(BundleError) as refusal:
        manifest_from_json(json.dumps(data))
    message = str(refusal.value)
    assert message.startswith(MANIFEST_FILENAME)
    name = path[-1] if isinstance(path[-1], str) else f"{path[-2]}[{path[-1]}]"
    assert name in message or "schema version" in message
    assert any(word in message for word in ("expected", "lacks fields", "unknown", "schema"))


@pytest.mark.parametrize(
    ("path", "wrong", "words"),
    [
        (("network", "two_way"), "medsam", "'medsam', expected one of: meta, public"),
        (("network", "family"), None, "network: family is None, expected a string"),
        (("network", "image_size"), 256.0, "image_size is 256.0, expected an integer"),
        (("network", "widths"), 96, "widths is 96, expected a list"),
        (("conventions", "threshold"), "0.5", "threshold is '0.5', expected a number"),
        (("conventions", "threshold"), 10**400, "expected a number"),
        (("conventions", "intensity_window"), [1], "has 1 values, expected 2"),
        (("conventions", "intensity_window"), "1,2", "expected a list or null"),
        (("graphs", "encoder", "inputs", 0, "shape", 1), 2.0, "expected an integer or a string"),
        (("files", 0, "opset"), "20", "opset is '20', expected an integer or null"),
        (("files", 0), [], r"files[0] is [], expected an object"),
        (("tools", "torch"), None, "tools: torch is None, expected a string"),
        (("schema",), 9, "has schema version 9; this medsa-deploy reads version 2"),
        (("schema",), "1", "has schema version '1'"),
        (("schema",), True, "has schema version True; this medsa-deploy reads version 2"),
        (("schema",), {"x": "y" * 9999}, "has schema version {'x': 'yyy"),
    ],
)
def test_messages(path: tuple[Any, ...], wrong: object, words: str) -> None:
    data = document()
    at(data, path)[path[-1]] = wrong
    with pytest.raises(BundleError) as refusal:
        manifest_from_json(json.dumps(data))
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "path", [p for p in paths({"": document()}) if isinstance(at({"": document()}, (*p, 0)), dict)]
)
def test_an_unknown_field_is_named(path: tuple[Any, ...]) -> None:
    data = {"": document()}
    at(data, (*path, 0))["surprise"] = 1
    if path[-1:] in FREE:
        words = r"surprise is 1, expected"
    else:
        words = "has unknown fields: surprise"
    with pytest.raises(BundleError, match=words):
        manifest_from_json(json.dumps(data[""]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"schema": NaN}', "is not JSON (NaN is not a number)"),
        ('{"schema": -Infinity}', "is not JSON"),
        ("[]", "has no schema version"),
        ("null", "has no schema version"),
        ('{"name": "a web app"}', "has no schema version: it is not a bundle's manifest"),
        ('{"schema": 2}', "lacks fields: conventions, files, graphs, network, source"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, words: str) -> None:
    with pytest.raises(BundleError) as refusal:
        manifest_from_json(text)
    assert words in str(refusal.value)


def test_numbers_too_large_for_a_float_are_refused() -> None:
    text = json.dumps(document()).replace('"threshold": 0.25', '"threshold": 1e999')
    with pytest.raises(BundleError, match="threshold is inf, expected a number"):
        manifest_from_json(text)


def test_a_whole_number_is_a_number_too() -> None:
    text = json.dumps(document()).replace('"threshold": 0.25', '"threshold": 0')
    threshold = manifest_from_json(text).conventions.threshold
    assert (threshold, type(threshold)) == (0.0, float)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one file, `encoder.onnx`, beside a file that is not part of it."""
    bundle = tmp_path / "a.medsa"
    bundle.mkdir()
    (tmp_path / "outside").write_bytes(b"12345")
    path = bundle / "encoder.onnx"
    path.write_bytes(b"12345")
    entry = describe_file(path, bundle, role="encoder", precision="fp32", opset=20)
    save_manifest(dataclasses.replace(full(), files=(entry,)), bundle)
    return bundle


def check(bundle: Path, **changes: Any) -> None:
    """Compare the bundle's file with its manifest, changed so."""
    loaded = load_manifest(bundle)
    entry = dataclasses.replace(loaded.files[0], **changes)
    check_files(dataclasses.replace(loaded, files=(entry,)), bundle)


def test_a_whole_bundle_passes(bundle: Path) -> None:
    check(bundle)
    entry = load_manifest(bundle).files[0]
    assert check_file(entry, bundle) == bundle / "encoder.onnx"
    assert (entry.path, entry.bytes, entry.opset) == ("encoder.onnx", 5, 20)


EXAMPLES = "atomic files folder leftovers lock manifest manifest_text node_names opened strict_json"


@pytest.mark.parametrize("name", EXAMPLES.split())
def test_examples_run(bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(bundle.parent)
    module = importlib.import_module(f"medsa_deploy.bundle.{name}")
    names = {"bundle": bundle, "manifest": load_manifest(bundle), "np": np}
    names["save_manifest"] = save_manifest
    ran = doctest.testmod(module, extraglobs=names, raise_on_error=True)
    assert ran.attempted


def test_files_below_and_links_inside_the_bundle_pass(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    (bundle / "encoder.onnx").rename(bundle / "engines/encoder.onnx")
    (bundle / "link.onnx").symlink_to(bundle / "engines/encoder.onnx")
    check(bundle, path="engines/encoder.onnx")
    check(bundle, path="link.onnx")


def test_a_changed_byte_is_refused(bundle: Path) -> None:
    (bundle / "encoder.onnx").write_bytes(b"12346")
    with pytest.raises(BundleError, match=r"encoder\.onnx is not the file .*SHA-256 differs"):
        check(bundle)


@pytest.mark.parametrize("content", [b"", b"1234", b"123456"])
def test_a_changed_size_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "encoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=rf"\({len(content)} bytes, expected 5\)"):
        check(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"a\.medsa lacks 'encoder\.onnx'"):
        check(bundle)


@pytest.mark.parametrize("absolute", [True, False])
def test_paths_out_of_the_bundle_are_refused(bundle: Path, absolute: bool) -> None:
    path = str(bundle.parent / "outside") if absolute else "../outside"
    with pytest.raises(BundleError, match=r"names a file outside the bundle, '.*outside'"):
        check(bundle, path=path)


def test_links_out_of_the_bundle_are_refused(bundle: Path) -> None:
    (bundle / "link").symlink_to(bundle.parent)
    (bundle / "encoder.onnx").unlink()
    (bundle / "encoder.onnx").symlink_to(bundle.parent / "outside")
    for path in ("encoder.onnx", "link/outside"):
        with pytest.raises(BundleError, match="names a file outside the bundle"):
            check(bundle, path=path)


@pytest.mark.parametrize("path", ["", ".", "a\0b", "x" * 5000, "loop", "folder", "encoder.onnx/x"])
def test_paths_that_are_no_file_are_refused(bundle: Path, path: str) -> None:
    (bundle / "loop").symlink_to(bundle / "loop")
    (bundle / "folder").mkdir()
    with pytest.raises(BundleError, match=r"lacks|cannot be read") as refusal:
        check(bundle, path=path)
    assert "\n" not in str(refusal.value)
    assert "\0" not in str(refusal.value)


def test_loading_what_is_no_bundle_is_refused(tmp_path: Path, bundle: Path) -> None:
    path = bundle / MANIFEST_FILENAME
    refusals: list[tuple[Path, str]] = [
        (tmp_path / "none.medsa", "does not exist: make a bundle with medsa-deploy export"),
        (path, "is a file, not a bundle folder: make a bundle"),
        (tmp_path, r"has no manifest\.json: it is not a bundle"),
    ]
    for folder, words in refusals:
        with pytest.raises(BundleError, match=words):
            load_manifest(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "cannot be read"),
        (b'{"schema": 9}', "has schema version 9; this medsa-deploy reads version 2: export"),
    ],
)
def test_a_manifest_that_cannot_be_read_names_its_bundle(
    bundle: Path, content: bytes, words: str
) -> None:
    (bundle / MANIFEST_FILENAME).write_bytes(content)
    with pytest.raises(BundleError, match=words) as refusal:
        load_manifest(bundle)
    assert str(bundle) in str(refusal.value)


def test_a_manifest_that_is_a_folder_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_FILENAME).unlink()
    (bundle / MANIFEST_FILENAME).mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        load_manifest(bundle)


def test_a_file_is_found_by_role_and_precision() -> None:
    manifest = full()
    assert manifest.file("encoder") is manifest.files[0]
    with pytest.raises(BundleError, match=r"no encoder in int8; it has: fp32$"):
        manifest.file("encoder", "int8")
    with pytest.raises(BundleError, match=r"no decoder in fp32; it has: none$"):
        manifest.file("decoder")


def test_masks_are_classes_or_all_tokens() -> None:
    network = full().network
    assert network.masks == 2
    assert dataclasses.replace(network, outputs="sam").masks == 4
