"""Bundles of other adapted SAMs in use: masks as their own code makes them, without prompts too."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from command_line import call, copied, edit_manifest, manifest_data
from PIL import Image
from test_postprocessing import SIZES, efficientsam, finetune_sam, medsam, samed

from medsa_deploy import Structure, load, read_volume, segment_volume
from medsa_deploy.bundle.manifest import Conventions, load_manifest
from medsa_deploy.errors import UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.images import read_labels

AUTOMATIC = ("samed", "finetune_sam_adapter", "finetune_sam_lora")
SMALL = [size for size in SIZES if min(size) > 30]


def picture(height: int, width: int, seed: int = 1) -> np.ndarray:
    """(H, W, 3) uint8, smooth and detailed."""
    return seeded_image(max(height, width), seed)[:height, :width]


def conventions(bundle: Path) -> Conventions:
    return load_manifest(bundle).conventions


def test_conventions_of_each_code(bundle_of) -> None:
    recorded = {
        name: (c.preprocess, c.postprocess, c.prompts, c.mask_choice)
        for name in (*AUTOMATIC, "sam_med2d", "efficientsam_official", "medsa_2d")
        if (c := conventions(bundle_of(name)))
    }
    assert recorded == {
        "samed": ("samed", "samed", "none", "first"),
        "finetune_sam_adapter": ("finetune-sam", "finetune-sam", "none", "first"),
        "finetune_sam_lora": ("finetune-sam", "finetune-sam", "none", "first"),
        "sam_med2d": ("sam-med2d", "sam", "required", "first"),
        "efficientsam_official": ("efficientsam", "efficientsam", "required", "best"),
        "medsa_2d": ("medsa", "sam", "required", "first"),
    }


@pytest.mark.parametrize(
    ("name", "original"), [("samed", samed), ("finetune_sam_lora", finetune_sam)]
)
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_label_maps_are_the_original_codes(name: str, original, size, bundle_of) -> None:
    with load(bundle_of(name)) as session:
        prediction = session.segment(session.encode(picture(*size)))
    expected = original(prediction.low_res_logits[0], prediction.frame)
    differing = int((prediction.labels != expected).sum())
    assert differing <= max(1, 1e-5 * expected.size)


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_efficientsams_mask_is_its_own_codes(size, bundle_of) -> None:
    """The best of three candidates by predicted IoU, bicubic, from the threshold on."""
    height, width = size
    with load(bundle_of("efficientsam_official")) as session:
        embedding = session.encode(picture(*size))
        prompts = {"points": [[(width // 2, height // 2)], [(width // 4, height // 3)]]}
        prediction = session.segment(embedding, **prompts)
        candidates = session.segment(embedding, **prompts, multimask=True)
        with pytest.raises(UsageError, match="the best of its candidates, chosen on the host"):
            session.segment(embedding, **prompts, on_device=True)
    assert prediction.masks.shape == (2, 1, *size)
    for mask, logits, scores in zip(
        prediction.masks, candidates.low_res_logits, candidates.scores, strict=True
    ):
        expected = efficientsam(logits[scores.argmax()][None], candidates.frame)
        assert (mask != expected).sum() <= max(1, 1e-5 * expected.size)
    np.testing.assert_array_equal(prediction.scores[:, 0], candidates.scores.max(axis=1))


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_medsams_mask_is_its_own_codes(size, sam_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(sam_bundle, tmp_path)
    edit_manifest(bundle, conventions__preprocess="medsam", conventions__postprocess="medsam")
    with load(bundle) as session:
        prediction = session.segment(session.encode(picture(*size)), box=(4, 4, 28, 28))
    expected = medsam(prediction.low_res_logits[0], prediction.frame)
    assert (prediction.masks[0] != expected).sum() <= max(1, 1e-5 * expected.size)


def test_a_bundle_that_does_not_say_keeps_sams_way(sam_bundle: Path, tmp_path: Path) -> None:
    import json

    bundle = copied(sam_bundle, tmp_path)
    path = bundle / "manifest.json"
    document = manifest_data(bundle)
    for name in ("postprocess", "prompts", "mask_choice"):
        del document["conventions"][name]
    path.write_text(json.dumps(document))
    old = conventions(bundle)
    assert (old.postprocess, old.prompts, old.mask_choice) == ("sam", "required", "first")
    pixels = picture(60, 90)
    predictions = []
    for each in (bundle, sam_bundle):
        with load(each) as session:
            predictions.append(session.segment(session.encode(pixels), points=[(30, 30)]))
    np.testing.assert_array_equal(predictions[0].masks, predictions[1].masks)


@pytest.mark.parametrize("name", AUTOMATIC)
def test_run_without_prompts(name: str, bundle_of, tmp_path: Path) -> None:
    """An image, a folder and a volume: label maps with the classes' names."""
    bundle = bundle_of(name)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(picture(120, 100)).save(folder / "a.png")
    Image.fromarray(picture(80, 150)).save(folder / "b.png")
    done = call("run", bundle, folder / "a.png", "-o", tmp_path / "labels.png", "--json")
    assert done.code == 0, done.err
    with load(bundle) as session:
        classes = session.classes
        labels = session.segment(session.encode(picture(120, 100))).labels
    written = np.asarray(Image.open(tmp_path / "labels.png"))
    np.testing.assert_array_equal(written > 0, labels > 0)
    if len(classes) > 1:
        np.testing.assert_array_equal(written, labels)
        assert list(done.json["pixels"]) == list(classes)
    done = call("run", bundle, folder, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.png.mask.png",
        "b.png.mask.png",
    ]

    array = np.stack([picture(48, 64, seed)[..., 0] for seed in range(3)], axis=-1)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "volume.nii.gz")
    done = call("run", bundle, tmp_path / "volume.nii.gz", "-o", tmp_path / "seg.nii.gz", "--json")
    assert done.code == 0, done.err
    volume = read_volume(tmp_path / "volume.nii.gz")
    with load(bundle) as session:
        expected = segment_volume(session, volume, [])
    np.testing.assert_array_equal(read_labels(tmp_path / "seg.nii.gz").values, expected.labels)
    assert expected.names == classes

    for prompt in (["--point", "5,5"], ["--box", "1,1,9,9"]):
        done = call("run", bundle, folder / "a.png", *prompt)
        assert done.code == 2
        assert "segments without prompts: leave points" in done.err


def test_a_network_of_clicks_still_needs_them(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(40, 40)).save(tmp_path / "a.png")
    done = call("run", bundle, tmp_path / "a.png")
    assert (done.code, "no prompt: give --point X,Y" in done.err) == (2, True)


@pytest.mark.parametrize("name", ["samed", "finetune_sam_adapter"])
def test_verify_and_profile_know_such_bundles(name: str, bundle_of, tmp_path: Path) -> None:
    bundle = bundle_of(name)
    done = call("verify", bundle, "--json")
    assert done.code == 0, done.err
    done = call("profile", bundle, "--runs", "1", "-o", tmp_path / "profile.html", "--json")
    assert done.code == 0, done.err
    assert done.json["stages"]["first click"]["samples_ms"]


def test_accuracy_of_automatic_masks(bundle_of, tmp_path: Path) -> None:
    """Against the bundle's own label map every class has Dice 1; no prompt is drawn."""
    bundle = bundle_of("samed")
    Image.fromarray(picture(90, 70)).save(tmp_path / "a.png")
    assert call("run", bundle, tmp_path / "a.png", "-o", tmp_path / "labels.png").code == 0
    done = call(
        *("verify", bundle, "--labels", tmp_path / "labels.png"),
        *("--images", tmp_path / "a.png", "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["prompt"] == "none"
    assert all(figures["dice"] == 1 for figures in done.json["files"][0]["classes"])


def test_a_structure_may_be_prompted_where_prompts_are_optional(bundle_of, tmp_path: Path) -> None:
    bundle = copied(bundle_of("finetune_sam_adapter"), tmp_path)
    edit_manifest(bundle, conventions__prompts="optional")
    array = np.stack([picture(48, 64, seed)[..., 0] for seed in range(2)], axis=-1)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "volume.nii.gz")
    volume = read_volume(tmp_path / "volume.nii.gz")
    with load(bundle) as session:
        boxed = session.segment_volume(volume, [Structure(boxes=((4, 4, 1, 40, 40, 2),))])
        everywhere = session.segment_volume(volume, [])
    assert (boxed.slices, everywhere.slices) == ((1,), (0, 1))
