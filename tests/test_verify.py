"""`medsa-deploy verify`: a bundle against its checkpoint's network, or what that gave at export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from command_line import accept_changes, call, copied, edit_manifest

from medsa_deploy import load
from medsa_deploy.bundle.manifest import Parity, TensorParity, load_manifest
from medsa_deploy.errors import BundleError, ParityError
from medsa_deploy.evaluation.cases import parity_cases, seeded_case, seeded_image
from medsa_deploy.evaluation.parity import (
    MASK_PIXELS_LIMIT,
    TENSORS,
    difference,
    parity_failures,
    require_parity,
    run_case,
)
from medsa_deploy.evaluation.reference_file import load_reference, save_reference


def rewritten_reference(copy: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change arrays of the saved reference, and have the manifest accept it."""
    path = copy / "reference.npz"
    with np.load(path) as data:
        arrays = dict(data)
    change(arrays)
    np.savez_compressed(path, **arrays)
    accept_changes(copy)


def test_a_good_bundle_without_its_checkpoint(bundle: Path) -> None:
    done = call("verify", bundle, "--json")
    assert done.code == 0, done.err
    document = done.json
    assert set(document) == {
        "bundle",
        "against",
        "parity",
        "failures",
        "engines",
        "report",
        "signers",
    }
    assert document["against"] == "saved reference"
    assert document["failures"] == []
    (parity,) = document["parity"]
    assert (parity["precision"], parity["backend"]) == ("fp32", "onnxruntime")
    assert (parity["images"], parity["seeded_images"], parity["prompt_sets"]) == (0, 1, 5)
    assert set(parity["tensors"]) == set(TENSORS)
    for tensor in parity["tensors"].values():
        assert 0 <= tensor["relative_l2"] <= 2e-5
    assert parity["mask_pixels_differing"] <= MASK_PIXELS_LIMIT


def test_a_good_bundle_with_its_checkpoint_and_images(
    bundle: Path, checkpoint_of, tmp_path: Path
) -> None:
    for i in range(2):
        picture = PIL.Image.fromarray(seeded_image(80 + i, i))
        picture.save(tmp_path / f"{i}.png")
    arguments = ["--checkpoint", checkpoint_of("medsa_2d"), "--images", tmp_path]
    done = call("verify", bundle, *arguments, "--json")
    assert done.code == 0, done.err
    assert done.json["against"] == "checkpoint"
    (parity,) = done.json["parity"]
    assert (parity["images"], parity["seeded_images"], parity["prompt_sets"]) == (2, 2, 20)
    cases = parity_cases(load_manifest(bundle), tmp_path / "1.png")
    assert [case.name for case in cases] == ["seed 1", "seed 2", "1.png"]


def test_what_is_said_of_a_good_bundle(bundle: Path) -> None:
    done = call("verify", bundle)
    assert done.code == 0
    assert (
        "fp32 in onnxruntime against the outputs that the checkpoint's own network gave at export"
        in done.out
    )
    assert done.out.endswith("verified\n")
    assert "compare every file with its SHA-256" in done.err


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_another_networks_decoder_is_detected(
    bundle: Path, bundle_of, checkpoint_of, tmp_path: Path, with_checkpoint: bool
) -> None:
    """Same shapes, other weights, and a manifest that lists it: only the proof can tell."""
    copy = copied(bundle, tmp_path)
    shutil.copy(bundle_of("medsa_hyp_2d") / "decoder.onnx", copy / "decoder.onnx")
    accept_changes(copy)
    arguments = ["--checkpoint", checkpoint_of("medsa_2d")] if with_checkpoint else []
    done = call("verify", copy, *arguments, "--json")
    assert done.code == 1, done.err
    assert [line.split(": ")[:2] for line in done.json["failures"][:2]] == [
        ["fp32", "low_res_masks"],
        ["fp32", "iou_predictions"],
    ]
    assert "relative L2" in done.json["failures"][0]
    result = call("verify", copy, *arguments)
    assert result.code == 1
    assert result.err.count("error: ") == len(done.json["failures"])
    assert "verified" not in result.out


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("medsa_2d_relpos", [], "is not the file this bundle was made from: medsa_2d.pth"),
        (None, [], "missing.pth does not exist"),
        ("medsa_2d", ["--base", "SAME"], "was made from medsa_2d.pth alone: leave --base out"),
        ("medsa_2d", ["--images", "missing.png"], "missing.png does not exist"),
        ("medsa_2d", ["--threads", "0"], "threads is 0"),
        ("medsa_2d", ["--precision", "int8"], "has no encoder in int8; it has: fp32"),
        ("medsa_2d", ["--backend", "cuda"], "unknown backend 'cuda'"),
    ],
)
def test_what_cannot_be_verified_is_one_line(
    bundle: Path, checkpoint_of, case: str | None, options: list[str], message: str
) -> None:
    checkpoint = Path("missing.pth") if case is None else checkpoint_of(case)
    options = [str(checkpoint) if option == "SAME" else option for option in options]
    done = call("verify", bundle, "--checkpoint", checkpoint, *options)
    assert done.code == 2
    assert message in done.error


def test_images_need_the_checkpoint(bundle: Path, tmp_path: Path) -> None:
    done = call("verify", bundle, "--images", tmp_path)
    assert done.code == 2
    assert "add --checkpoint FILE (this bundle was made from medsa_2d.pth)" in done.error


def test_a_bundle_made_over_a_base_needs_it(bundle: Path, checkpoint_of, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, source__base="sam.pth", source__base_sha256="0" * 64)
    checkpoint = checkpoint_of("medsa_2d")
    without = call("verify", copy, "--checkpoint", checkpoint)
    assert without.code == 2
    assert "was made over sam.pth: add --base FILE" in without.error
    wrong = call("verify", copy, "--checkpoint", checkpoint, "--base", checkpoint)
    assert wrong.code == 2
    assert "is not the file this bundle was made from: sam.pth" in wrong.error


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_reference_that_is_none_is_one_line(bundle, tmp_path: Path, content: bytes) -> None:
    copy = copied(bundle, tmp_path)
    (copy / "reference.npz").write_bytes(content)
    accept_changes(copy)
    done = call("verify", copy)
    assert done.code == 2
    assert "is not a reference that medsa-deploy wrote" in done.error


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda a: a.pop("low_res_masks"), 2, "is not a reference that medsa-deploy wrote"),
        (lambda a: a.pop("prompt.0.points"), 2, "is not a reference that medsa-deploy wrote"),
        (lambda a: a.update(iou_predictions=a["iou_predictions"][:2]), 1, "different shapes"),
        (lambda a: a.update(images=a["images"][..., 0, 0]), 2, "has shape (256,), expected (H, W)"),
    ],
)
def test_a_reference_that_does_not_fit_is_one_line(
    bundle: Path, tmp_path: Path, change: Callable, code: int, message: str
) -> None:
    copy = copied(bundle, tmp_path)
    rewritten_reference(copy, change)
    done = call("verify", copy)
    assert done.code == code
    assert message in done.error


def test_a_reference_with_nan_never_verifies(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    rewritten_reference(copy, lambda a: a["image_embeddings"].fill(np.nan))
    assert call("verify", copy).code == 1


def test_a_bundle_without_a_reference_says_so(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    with load(bundle) as session:
        files = [f for f in session.manifest.files if f.role != "reference"]
    edit_manifest(copy, files=[vars(f) for f in files])
    (copy / "reference.npz").unlink()
    done = call("verify", copy)
    assert done.code == 2
    assert "the bundle has no reference" in done.error


# The comparison itself


def test_difference() -> None:
    expected = np.array([3.0, 4.0], np.float32)
    assert difference(expected, expected) == TensorParity(relative_l2=0, max_abs=0)
    figures = difference(expected, np.array([3.0, 4.5], np.float32))
    assert figures == TensorParity(relative_l2=pytest.approx(0.1), max_abs=0.5)
    with pytest.raises(ParityError, match=r"shapes: found \(1,\), expected \(2,\)"):
        difference(expected, expected[:1])


def parity(*, relative_l2: float = 0.0, pixels: float = 0.0) -> Parity:
    tensors = {"low_res_masks": TensorParity(relative_l2=relative_l2, max_abs=1.0)}
    return Parity(
        precision="fp32",
        backend="onnxruntime",
        images=0,
        seeded_images=1,
        prompt_sets=1,
        tensors=tensors,
        mask_pixels_differing=pixels,
    )


@pytest.mark.parametrize(
    ("figures", "failures"),
    [
        ({}, []),
        ({"relative_l2": 1e-4, "pixels": 1e-4}, []),
        ({"relative_l2": 1.1e-4}, ["low_res_masks: relative L2 1.1e-04 > 1e-04"]),
        ({"pixels": 2e-4}, ["2.0e-04 of mask pixels differ > 1e-04"]),
        ({"relative_l2": float("nan")}, ["low_res_masks: relative L2 nan > 1e-04"]),
        ({"pixels": float("nan")}, ["nan of mask pixels differ > 1e-04"]),
    ],
)
def test_limits(figures: dict[str, float], failures: list[str]) -> None:
    measured = parity(**figures)
    assert parity_failures(measured) == failures
    if failures:
        with pytest.raises(ParityError, match="are not the checkpoint's network: "):
            require_parity(measured)
    else:
        require_parity(measured)


def test_seeded_cases_are_the_same_everywhere_and_of_every_kind() -> None:
    first, same, other = (seeded_case(64, 16, seed) for seed in (1, 1, 2))
    pixels = [case.images[0].pixels for case in (first, same, other)]
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] != pixels[2]).any()
    assert np.ptp(pixels[0]) == 255
    chunk = seeded_case(64, 16, 1, slices=3).images
    assert (chunk[0].pixels == pixels[0]).all()
    assert len({image.pixels.tobytes() for image in chunk}) == 3
    kinds = {(len(p.points), p.box is not None, p.mask is not None) for p in first.prompts}
    assert kinds == {(1, 0, 0), (3, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1)}


@pytest.mark.parametrize("case_name", ["bundle", "bundle_3d"])
def test_a_saved_reference_comes_back_as_it_was(case_name: str, request, tmp_path: Path) -> None:
    bundle = request.getfixturevalue(case_name)
    with load(bundle) as session:
        case = seeded_case(256, 64, 3, slices=session.manifest.network.chunk)
        outputs = run_case(session, case)
    save_reference(tmp_path / "reference.npz", case, outputs)
    back, tensors = load_reference(tmp_path / "reference.npz")
    for read, written in zip(back.images, case.images, strict=True):
        np.testing.assert_array_equal(read.pixels, written.pixels)
    assert len(back.prompts) == len(case.prompts)
    for read, written in zip(back.prompts, case.prompts, strict=True):
        for part in ("points", "labels", "box", "mask"):
            np.testing.assert_array_equal(getattr(read, part), getattr(written, part))
    for name, values in outputs.tensors.items():
        np.testing.assert_array_equal(tensors[name], values)
    with pytest.raises(BundleError, match="is not a reference"):
        load_reference(bundle / "encoder.onnx")
