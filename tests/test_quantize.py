"""`medsa-deploy quantize`: precisions added to a bundle, by what their masks need."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import PIL.Image
import pytest
from command_line import accept_changes, call, command, contents, copied, start
from onnx import helper, numpy_helper

from medsa_deploy import load, stages
from medsa_deploy.bundle.additions import add_files, work_folder
from medsa_deploy.bundle.files import check_files
from medsa_deploy.bundle.manifest import Parity, load_manifest, save_manifest
from medsa_deploy.bundle.node_names import module_of
from medsa_deploy.evaluation.cases import parity_cases, seeded_image
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.evaluation.parity import DICE_TOLERANCE, LIMITS, parity_failures
from medsa_deploy.graph.files import load_graph
from medsa_deploy.stages.quantize.candidates import CandidateRunner
from medsa_deploy.stages.quantize.int8 import Search

FORMS = ("medsa_2d_relpos", "medsa_hyp_2d", "medsa_lora", "medsa_mobile")
"""Forms of the network besides `medsa_2d`, which most tests use."""


def images_in(folder: Path, count: int, size: int = 200) -> Path:
    folder.mkdir()
    for i in range(count):
        picture = PIL.Image.fromarray(seeded_image(size, 100 + i))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def half(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with float16 graphs."""
    copy = copied(bundle, tmp_path_factory.mktemp("half"))
    done = call("quantize", copy, "--fp16", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert set(document) == {"bundle", "precision", "recipe", "parity", "files", "seconds"}
    assert document["precision"] == "fp16"
    assert [f["path"] for f in document["files"]] == ["encoder.fp16.onnx", "decoder.fp16.onnx"]
    return copy


@pytest.fixture(scope="module")
def every(half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with every precision."""
    folder = tmp_path_factory.mktemp("every")
    copy = copied(half, folder)
    images = images_in(folder / "images", 6)
    for target in ("tensorrt", "cpu"):
        done = call("quantize", copy, "--int8", "--calibration", images, "--for", target)
        assert done.code == 0, done.err
        assert "calibration on 6 image(s): 32 or more" in done.err
    return copy


# Float16


def test_float16_is_in_the_bundle_with_its_recipe(half: Path, bundle: Path) -> None:
    manifest = load_manifest(half)
    check_files(manifest, half)
    recipe = manifest.recipe("fp16")
    assert recipe is not None
    assert {island.reason for island in recipe.islands} >= {"norms", "softmax", "coordinates"}
    assert recipe.float32_blocks == ()
    assert recipe.rounded_dice_mean is not None
    assert recipe.rounded_dice_mean >= LIMITS["fp16"].dice_mean
    (parity,) = (p for p in manifest.parity if p.precision == "fp16")
    assert parity.nan_count == 0
    assert (parity.seeded_images, parity.prompt_sets) == (2, 10)
    assert parity.mask_dice_worst is not None
    assert parity.mask_dice_worst >= LIMITS["fp16"].dice_worst
    for name in ("encoder", "decoder"):
        assert manifest.file(name, "fp16").bytes < 0.6 * manifest.file(name).bytes
    assert set(contents(bundle)) == set(contents(half)) - {
        "encoder.fp16.onnx",
        "decoder.fp16.onnx",
    }


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_network(name: str, bundle_of: Any, tmp_path: Path) -> None:
    bundle = copied(bundle_of(name), tmp_path)
    assert call("quantize", bundle, "--fp16").code == 0
    assert parity_failures(load_manifest(bundle).parity[-1]) == []


def test_a_network_that_sees_depth(
    bundle_3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its INT8 ranges are measured on chunks of volumes.

    Layers are left out in the graph's order; that of their costs takes 14 runs more.
    """
    monkeypatch.setattr(Search, "most_costly_first", lambda search: search.layers)
    copy = copied(bundle_3d, tmp_path)
    voxels = np.stack([seeded_image(60, i)[..., 0] for i in range(9)], axis=-1)
    volume = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), volume)
    done = call("quantize", copy, "--int8", "--calibration", volume)
    assert done.code == 0, done.err
    recipe = load_manifest(copy).recipe("int8")
    assert recipe is not None
    assert recipe.calibration is not None
    assert recipe.calibration.images == 4 * 4
    assert call("verify", copy).code == 0


def test_the_users_images_are_among_what_is_compared(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    images = images_in(tmp_path / "images", 2)
    done = call("quantize", copy, "--fp16", "--images", images)
    assert done.code == 0, done.err
    assert "worst of 2 image(s), 2 seeded image(s), 20 prompt sets" in done.out
    assert "norms (" in done.out
    assert "with every result rounded to float16" in done.out


def test_float16_masks_are_float32s(half: Path, bundle: Path) -> None:
    image = seeded_image(180, 9)
    masks = []
    for precision in ("fp32", "fp16"):
        with load(half, precision=precision) as session:
            embedding = session.encode(image)
            masks.append(session.segment(embedding, box=(20, 30, 150, 160)).masks)
    pairs = zip(*(of_precision[0] for of_precision in masks), strict=True)
    assert min(dice(mask, other) for mask, other in pairs) >= 0.98


def disturbed(bundle: Path, folder: Path, size: float) -> Path:
    """A bundle whose block 1 adds `size` to its values and takes it away again."""
    copy = copied(bundle, folder)
    model = load_graph(copy / "encoder.onnx")
    (i,) = (
        i
        for i, node in enumerate(model.graph.node)
        if module_of(node) == "blocks.1.mlp.0" and node.op_type == "MatMul"
    )
    node = model.graph.node[i]
    output, node.output[0] = node.output[0], "undisturbed"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(size), "far"))
    there = helper.make_node("Add", ["undisturbed", "far"], ["far_off"], name="there")
    back = helper.make_node("Sub", ["far_off", "far"], [output], name="back")
    for k, added in enumerate((there, back)):
        added.metadata_props.extend(node.metadata_props)
        model.graph.node.insert(i + 1 + k, added)
    onnx.save(model, copy / "encoder.onnx")
    accept_changes(copy)
    return copy


@pytest.mark.parametrize(
    ("size", "reason", "blocks"),
    [
        (6000.0, None, ("encoder blocks.1",)),
        (30000.0, "values beyond float16", ()),
        (1e5, "constants beyond float16", ()),
    ],
)
def test_what_float16_cannot_hold_returns_to_float32(
    bundle: Path, tmp_path: Path, size: float, reason: str | None, blocks: tuple[str, ...]
) -> None:
    """By measured masks where values fit but their digits do not; else by measured values."""
    copy = disturbed(bundle, tmp_path, size)
    done = call("quantize", copy, "--fp16")
    assert done.code == 0, done.err
    recipe = load_manifest(copy).recipe("fp16")
    assert recipe is not None
    assert recipe.float32_blocks == blocks
    assert reason is None or reason in {island.reason for island in recipe.islands}
    assert ("return encoder blocks.1 to float32" in done.err) == bool(blocks)


# INT8


def test_int8_is_in_the_bundle_with_its_recipe(every: Path) -> None:
    manifest = load_manifest(every)
    check_files(manifest, every)
    for precision, target, activations, decoder in (
        ("int8", "tensorrt", "int8, symmetric", "decoder.fp16.onnx"),
        ("int8-cpu", "cpu", "uint8", "decoder.onnx"),
    ):
        recipe = manifest.recipe(precision)
        assert recipe is not None
        assert (recipe.target, recipe.activations) == (target, activations)
        assert recipe.quantized
        assert not set(recipe.quantized) & set(recipe.left_out)
        assert recipe.calibration is not None
        assert recipe.calibration.images == 6
        assert recipe.reference_dice_mean is not None
        assert manifest.file("decoder", precision).path == decoder
        operators = [n.op_type for n in load_graph(every / f"encoder.{precision}.onnx").graph.node]
        assert operators.count("DequantizeLinear") > len(recipe.quantized)
        (parity,) = (p for p in manifest.parity if p.precision == precision)
        assert parity_failures(parity) == []
        assert (parity.images, parity.seeded_images) == (4, 0), "of the user's images"


def test_every_precision_is_verified(every: Path) -> None:
    done = call("verify", every, "--json")
    assert done.code == 0, done.err
    names = [parity["precision"] for parity in done.json["parity"]]
    assert names == ["fp32", "fp16", "int8", "int8-cpu"]
    means = [parity["mask_dice_mean"] for parity in done.json["parity"]]
    assert means[0] > means[1] > max(means[2:])
    manifest = load_manifest(every)
    for precision, mean in zip(names[2:], means[2:], strict=True):
        recipe = manifest.recipe(precision)
        assert recipe is not None
        assert mean == pytest.approx(recipe.reference_dice_mean, abs=1e-3)


def test_int8_with_the_rest_in_bfloat16(every: Path) -> None:
    import openvino

    done = call("verify", every, "--backend", "openvino", "--precision", "int8-bf16", "--json")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert done.code == 2
        assert "does not compute in bf16: use fp32, or int8-cpu" in done.error
        return
    (parity,) = done.json["parity"]
    assert (parity["precision"], parity["backend"]) == ("int8-bf16", "openvino")
    recipe = load_manifest(every).recipe("int8-cpu")
    assert recipe is not None
    assert recipe.reference_dice_mean is not None
    least = recipe.reference_dice_mean - DICE_TOLERANCE
    assert done.code == (0 if parity["mask_dice_mean"] >= least else 1)
    assert parity["mask_dice_mean"] > 0.9
    refused = call("verify", every, "--precision", "int8-bf16")
    assert refused.code == 2
    assert refused.error.startswith("int8-bf16 is available only with openvino")


def test_int8_is_judged_on_images_where_there_are_some(
    every: Path, checkpoint_of: Any, tmp_path: Path
) -> None:
    arguments = ["--checkpoint", checkpoint_of("medsa_2d"), "--precision", "int8", "--json"]
    for images, counts in (([], (0, 1)), (["--images", images_in(tmp_path / "i", 1)], (1, 0))):
        done = call("verify", every, *arguments, *images)
        assert done.code == 0, done.err
        (parity,) = done.json["parity"]
        assert (parity["images"], parity["seeded_images"]) == counts


def test_int8_that_gives_less_than_it_did_fails_verification(every: Path, tmp_path: Path) -> None:
    copy = copied(every, tmp_path)
    manifest = load_manifest(copy)
    recipes = [
        dataclasses.replace(r, reference_dice_mean=1.0) if r.precision == "int8" else r
        for r in manifest.recipes
    ]
    save_manifest(dataclasses.replace(manifest, recipes=tuple(recipes)), copy)
    model = load_graph(copy / "encoder.int8.onnx")
    (tensor,) = (t for t in model.graph.initializer if t.name == "positions_float16")
    values = numpy_helper.to_array(tensor) * np.float16(1.5)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, copy / "encoder.int8.onnx")
    accept_changes(copy)
    done = call("verify", copy, "--precision", "int8", "--json")
    assert done.code == 1
    assert done.json["failures"][0].endswith("< 0.98")


def test_precisions_run_without_torch_and_onnx(every: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(seeded_image(100, 4)).save(tmp_path / "a.png")
    for precision in ("fp16", "int8", "int8-cpu"):
        options = ["--precision", precision, "--point", "40,40", "-o", tmp_path / "mask.png"]
        done = start("run", every, tmp_path / "a.png", *options, without=("torch", "onnx"))
        assert done.code == 0, done.err


def test_a_precision_is_replaced_without_leftovers(every: Path, tmp_path: Path) -> None:
    copy = copied(every, tmp_path)
    (copy / "encoder.fp16.onnx.data").write_bytes(b"of a larger network")
    before = contents(copy)
    assert call("quantize", copy, "--fp16").code == 0
    after = contents(copy)
    assert set(before) - set(after) == {"encoder.fp16.onnx.data"}
    graphs = {name for name in after if name.endswith(".onnx")}
    assert {name: before[name] for name in graphs} == {name: after[name] for name in graphs}
    manifest = load_manifest(copy)
    assert [parity.precision for parity in manifest.parity] == ["fp32", "int8", "int8-cpu", "fp16"]


def test_int8_goes_when_the_decoder_it_used_is_replaced(every: Path, tmp_path: Path) -> None:
    copy = copied(every, tmp_path)
    with (copy / "decoder.fp16.onnx").open("ab") as f:
        f.write(b"of another recipe")
    accept_changes(copy)
    done = call("quantize", copy, "--fp16")
    assert done.code == 0
    assert "int8 was made over an earlier fp16 and is removed: make it again" in done.err
    manifest = load_manifest(copy)
    assert {file.precision for file in manifest.files} == {"fp32", "fp16", "int8-cpu"}
    assert {recipe.precision for recipe in manifest.recipes} == {"fp16", "int8-cpu"}
    assert {parity.precision for parity in manifest.parity} == {"fp32", "fp16", "int8-cpu"}
    assert not (copy / "encoder.int8.onnx").exists()
    assert call("verify", copy).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_int8_of_every_form(name: str, bundle_of: Any, tmp_path: Path) -> None:
    bundle = copied(bundle_of(name), tmp_path)
    images = images_in(tmp_path / "images", 32)
    for target in ("tensorrt", "cpu"):
        stages.quantize_bundle(bundle, precision="int8", calibration=[images], target=target)
    assert call("verify", bundle).code == 0


# What goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --fp16 and --int8"),
        (["--fp16", "--int8"], "give one of --fp16 and --int8"),
        (["--int8"], "int8 is fitted to your own images: give --calibration"),
        (["--int8", "--calibration", "missing"], "missing does not exist"),
        (["--int8", "--calibration", "EMPTY"], "holds no images"),
        (["--int8", "--calibration", "DAMAGED"], "cannot be read"),
        (["--int8", "--calibration", "DAMAGED", "--for", "tpu"], "'tpu' is not one of"),
        (["--fp16", "--calibration", "EMPTY"], "calibration images are for int8"),
        (["--fp16", "--images", "missing.png"], "missing.png does not exist"),
        (["--fp16", "--threads", "0"], "threads is 0"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(
    bundle: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    copy = copied(bundle, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    named = {"EMPTY": tmp_path / "empty", "DAMAGED": tmp_path / "damaged.png"}
    before = contents(copy)
    done = call("quantize", copy, *(named.get(option, option) for option in options))
    assert done.code == 2
    assert message in done.error.replace('"', "'")
    assert contents(copy) == before


def test_a_changed_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    with (copy / "encoder.onnx").open("ab") as f:
        f.write(b"more")
    done = call("quantize", copy, "--fp16")
    assert done.code == 2
    assert "is not the file the manifest describes" in done.error


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(copy)
    run = " ".join(command("quantize", copy, "--fp16"))
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 1000; exec {run}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "error: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(copy) == before


def test_files_are_added_with_their_manifest_or_not_at_all(half: Path, tmp_path: Path) -> None:
    copy = copied(half, tmp_path)
    before = contents(copy)
    manifest = load_manifest(copy)
    parity = dataclasses.replace(manifest.parity[0], mask_pixels_differing=float("nan"))
    with work_folder(copy) as folder:
        for name in ("encoder.fp16.onnx", "new.onnx"):
            (folder / name).write_bytes(b"new")
        files = sorted(folder.iterdir())
        with pytest.raises(ValueError, match="JSON"):
            add_files(copy, files, dataclasses.replace(manifest, parity=(parity,)))
    assert contents(copy) == before


def test_masks_that_are_not_float32s_fail_verification(half: Path, tmp_path: Path) -> None:
    def damage(change: Callable[[np.ndarray], np.ndarray]) -> Any:
        copy = copied(half, tmp_path / str(len(list(tmp_path.iterdir()))))
        model = load_graph(copy / "decoder.fp16.onnx")
        (tensor,) = (t for t in model.graph.initializer if t.name == "fixed_float16")
        values = change(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
        onnx.save(model, copy / "decoder.fp16.onnx")
        accept_changes(copy)
        done = call("verify", copy, "--json")
        assert done.code == 1
        return done.json

    for i in range(2):
        (tmp_path / str(i)).mkdir()
    document = damage(lambda x: -x)
    figures = [failure.split(" 0")[0] for failure in document["failures"]]
    assert figures == ["fp16: mean mask Dice", "fp16: worst mask Dice"]
    document = damage(lambda x: x * np.nan)
    assert document["failures"][0].endswith("values are NaN or infinite")
    assert document["parity"][1]["nan_count"] > 0
    json.dumps(document, allow_nan=False)


# The measure


def parity(**figures: Any) -> Parity:
    return Parity(
        **{"precision": "fp16", "backend": "onnxruntime", "images": 0, "seeded_images": 1},
        **{"prompt_sets": 1, "tensors": {}, "mask_pixels_differing": 0.01},
        **figures,
    )


@pytest.mark.parametrize(
    ("figures", "failures"),
    [
        ({"mask_dice_mean": 0.995, "mask_dice_worst": 0.98}, []),
        ({"mask_dice_mean": 0.99, "mask_dice_worst": 0.98}, ["mean mask Dice 0.9900 < 0.995"]),
        ({"mask_dice_mean": 1.0, "mask_dice_worst": 0.9}, ["worst mask Dice 0.9000 < 0.98"]),
        (
            {"mask_dice_mean": 1.0, "mask_dice_worst": 1.0, "nan_count": 3},
            ["3 values are NaN or infinite"],
        ),
        ({}, ["mean mask Dice None < 0.995", "worst mask Dice None < 0.98"]),
        ({"mask_dice_mean": float("nan"), "mask_dice_worst": 1.0}, ["mean mask Dice nan < 0.995"]),
    ],
)
def test_limits_of_float16(figures: dict[str, float], failures: list[str]) -> None:
    assert parity_failures(parity(**figures)) == failures


def test_the_saved_references_case_must_agree_by_itself(bundle: Path) -> None:
    """What verify goes by later is only that case: the mean of all must not hide it."""
    manifest = load_manifest(bundle)
    to_run = parity_cases(manifest, None)
    trials = CandidateRunner(bundle, manifest, to_run, None)
    assert trials.measure(trials.encoder, trials.decoder, "fp16").failures == ()
    trials._expected[0]["low_res_masks"] = -trials._expected[0]["low_res_masks"]
    failed = trials.measure(trials.encoder, trials.decoder, "fp16").failures
    assert len(failed) == 3
    assert trials.runs == 2
