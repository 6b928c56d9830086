"""`medsa-deploy verify --labels`: figures of segmentations and of prompts drawn from labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pytest
from command_line import call, copied, edit_manifest, start
from dicom_series import save, slices
from hypothesis import given
from hypothesis.extra.numpy import arrays

from medsa_deploy import load, read_image
from medsa_deploy.evaluation import metrics
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.images import read_volume, write_segmentation
from medsa_deploy.stages.verify.drawn_prompts import box_around, next_click
from medsa_deploy.stages.verify.matched_files import pair_files

HEIGHT, WIDTH = 90, 130
IMAGE = seeded_image(WIDTH, 3)[:HEIGHT]
AFFINE = np.diag([0.8, 0.7, 5.0, 1.0])


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of its own for every test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


def discs(*specs: tuple[int, int, int], shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Labels 1, 2, … as discs: row, column, radius; a radius of 0 is no disc."""
    rows, columns = np.indices(shape)
    labels = np.zeros(shape, np.uint8)
    for number, (row, column, radius) in enumerate(specs, 1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = number
    return labels


LABELS = discs((40, 40, 20), (50, 100, 15))
MOVED = discs((43, 42, 20), (50, 97, 15))


def png(path: str, values: np.ndarray) -> Path:
    Path(path).parent.mkdir(exist_ok=True)
    PIL.Image.fromarray(values).save(path)
    return Path(path)


def nifti(path: str, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return Path(path)


def volume() -> np.ndarray:
    """(64, 48, 6) uint8, no slice like another."""
    return np.stack([seeded_image(64, k)[:, :48, 0] for k in range(6)], axis=-1)


def volume_labels() -> np.ndarray:
    """(64, 48, 6): label 1 in slices 1 to 4, label 2 in slice 3."""
    labels = np.stack([discs((30, 20, 6 + k), shape=(64, 48)) for k in range(6)], axis=-1)
    labels[..., (0, 5)] = 0
    labels[50:60, 30:44, 3] = 2
    return labels


def figures(truth: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    return {
        "dice": pytest.approx(metrics.dice(truth, mask)),
        "iou": pytest.approx(metrics.iou(truth, mask)),
        "hd95": pytest.approx(metrics.hausdorff(truth, mask, spacing), rel=1e-6),
    }


def measured(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("dice", "iou", "hd95")}


def assert_alike(entry: dict[str, Any], other: dict[str, Any]) -> None:
    """Two files' figures, whose spacings were written with different precision."""
    distances = [figures.pop("hd95") for figures in (entry, other)]
    assert entry == other
    assert distances == [None, None] or distances[0] == pytest.approx(distances[1], rel=1e-5)


def test_two_files_are_compared(bundle: Path) -> None:
    arguments = ("--labels", png("a.png", LABELS), "--segmentation", png("b.png", MOVED))
    document = call("verify", bundle, *arguments, "--class-names", "cyst,node", "--json").json
    (file,) = document["files"]
    assert file["unit"] == "px"
    for label, entry in enumerate(file["classes"], 1):
        assert (entry["label"], entry["name"]) == (label, ("cyst", "node")[label - 1])
        assert measured(entry) == figures(LABELS == label, MOVED == label, (1, 1))
        assert entry["label_pixels"] == (LABELS == label).sum()
    overall, *classes = document["summary"]
    assert [c["name"] for c in classes] == ["cyst", "node"]
    dices = [entry["dice"] for entry in file["classes"]]
    assert overall["dice"]["mean"] == pytest.approx(sum(dices) / 2)
    assert overall["dice"]["worst"] == min(dices)
    assert overall["dice"]["worst_file"] == "a.png"
    assert overall["hd95"]["worst"] == max(entry["hd95"] for entry in file["classes"])
    assert (document["precision"], document["prompt"], document["failures"]) == (None, None, [])
    shown = call("verify", bundle, *arguments)
    assert shown.code == 0
    assert "class 1" in shown.out
    assert "pixels" in shown.out
    assert f"{dices[0]:.4f}" in shown.out


@pytest.mark.parametrize("suffix", ["png", "npy", "nii.gz"])
def test_what_run_wrote_is_compared(bundle: Path, suffix: str) -> None:
    png("image.png", IMAGE)
    label = png("label.png", np.asarray(LABELS == 1))
    mask = f"mask.{suffix}"
    assert call("run", bundle, "image.png", "--box", "17,17,63,63", "-o", mask).code == 0
    document = call("verify", bundle, "--labels", label, "--segmentation", mask, "--json").json
    with load(bundle) as session:
        prediction = session.segment(session.encode(IMAGE), box=(17, 17, 63, 63))
    expected = figures(LABELS == 1, prediction.masks[0, 0], (1, 1))
    assert measured(document["files"][0]["classes"][0]) == expected
    assert document["files"][0]["unit"] == "px"


def test_folders_are_matched_by_name(bundle: Path) -> None:
    Path("images").mkdir()
    for name in ("a", "b", "extra"):
        png(f"images/{name}.png", IMAGE)
    assert call("run", bundle, "images", "--box", "17,17,63,63", "-o", "masks").code == 0
    png("labels/a.png", LABELS)
    png("labels/b_label.png", np.asarray(MOVED == 2))
    done = call("verify", bundle, "--labels", "labels", "--segmentation", "masks", "--json")
    assert [(f["labels"], f["compared"]) for f in done.json["files"]] == [
        ("labels/a.png", "masks/a.png.mask.png"),
        ("labels/b_label.png", "masks/b.png.mask.png"),
    ]
    assert done.json["unlabelled"] == ["masks/extra.png.mask.png"]
    assert [s["count"] for s in done.json["summary"]] == [3, 2, 1]


def test_a_box_is_drawn_from_each_label(bundle: Path) -> None:
    png("images/a.png", IMAGE)
    png("labels/a.png", LABELS)
    document = call("verify", bundle, "--labels", "labels", "--images", "images", "--json").json
    with load(bundle) as session:
        embedding = session.encode(read_image("images/a.png"))
        for label, box in ((1, (18, 18, 63, 63)), (2, (83, 33, 118, 68))):
            mask = session.segment(embedding, box=box).masks[0, 0]
            expected = figures(LABELS == label, mask, (1, 1))
            assert measured(document["files"][0]["classes"][label - 1]) == expected
    assert (document["prompt"], document["precision"], document["backend"]) == (
        "box",
        "fp32",
        "onnxruntime",
    )


def test_clicks_go_where_the_mask_is_wrong(bundle: Path) -> None:
    image, label = png("image.png", IMAGE), png("label.png", np.asarray(LABELS == 1))
    arguments = ("verify", bundle, "--labels", label, "--images", image, "--json", "--prompt")
    truth = LABELS == 1
    with load(bundle) as session:
        embedding = session.encode(read_image(image))
        points, signs, masks = [(40, 40)], [1], []
        for _ in range(3):
            prediction = session.segment(embedding, points=points, labels=signs)
            masks.append(prediction.masks[0, 0])
            click = next_click(truth[None], masks[-1][None])
            assert click is not None
            points.append(click[0])
            signs.append(click[1])
    for prompt, mask in (("click", masks[0]), ("clicks3", masks[2])):
        (entry,) = call(*arguments, prompt).json["files"][0]["classes"]
        assert entry["segmented_pixels"] == mask.sum()
        assert entry["dice"] == pytest.approx(metrics.dice(truth, mask))


MASKS = arrays(np.bool_, (9, 11))


@given(MASKS, MASKS)
def test_a_click_is_inside_the_largest_error(label: np.ndarray, mask: np.ndarray) -> None:
    click = next_click(label[None], mask[None])
    if click is None:
        assert (label == mask).all()
        return
    (x, y), sign = click
    assert (label[y, x], mask[y, x]) == ((True, False) if sign else (False, True))
    wrong = max(metrics.depth(label & ~mask).max(), metrics.depth(mask & ~label).max())
    assert metrics.depth(label & ~mask if sign else mask & ~label)[y, x] == wrong


@given(MASKS.filter(np.any))
def test_a_box_holds_its_label_and_three_pixels(label: np.ndarray) -> None:
    x0, y0, x1, y1 = box_around(label)
    outside = label.copy()
    outside[max(y0 + 3, 0) if y0 else 0 : y1, x0:x1] = False
    assert not outside.any()
    rows, columns = np.nonzero(label)
    assert (x0, y1) == (max(columns.min() - 3, 0), min(rows.max() + 4, 9))


def test_a_volume_is_measured_in_millimetres(bundle: Path) -> None:
    labels = volume_labels()
    image, label = nifti("v.nii.gz", volume()), nifti("l.nii.gz", labels)
    document = call("verify", bundle, "--labels", label, "--images", image, "--json").json
    masks = np.zeros((3, *labels.shape), bool)
    with load(bundle) as session:
        for k in range(6):
            for value in (v for v in np.unique(labels[..., k]) if v):
                embedding = session.encode(volume()[..., k])
                box = box_around(labels[..., k] == value)
                masks[value, ..., k] = session.segment(embedding, box=box).masks[0, 0]
    (file,) = document["files"]
    assert file["unit"] == "mm"
    for value in (1, 2):
        expected = figures(labels == value, masks[value], (0.8, 0.7, 5.0))
        assert measured(file["classes"][value - 1]) == expected
    # The same volume, stored in another order and direction, has the same figures.
    turned = np.flip(labels, 0).transpose(2, 1, 0)
    affine = AFFINE @ np.array([[0, 0, -1, 63], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    nifti("turned.nii", turned, affine)
    again = call("verify", bundle, "--labels", "turned.nii", "--images", image, "--json").json
    assert again["files"][0]["classes"] == file["classes"]


def test_the_labels_spacing_counts_where_the_image_has_none(bundle: Path) -> None:
    label, lone = nifti("l.nii.gz", volume_labels()), nifti("v.nii.gz", volume())
    np.save("v.npy", volume())
    arguments = ("verify", bundle, "--labels", label, "--json", "--axis", 2, "--images")
    (alone,), (other,) = (call(*arguments, image).json["files"] for image in (lone, "v.npy"))
    assert alone["unit"] == other["unit"] == "mm"
    assert alone["classes"] == other["classes"]


def test_axis_and_volume_are_those_of_run(bundle: Path) -> None:
    both = np.stack([np.zeros_like(volume()), volume()], axis=-1)
    image, label = nifti("4d.nii.gz", both), nifti("l.nii.gz", volume_labels())
    arguments = ("verify", bundle, "--labels", label, "--json", "--images")
    done = call(*arguments, image)
    assert done.code == 2
    assert "choose one of its volumes (--volume)" in done.error
    lone = nifti("3d.nii.gz", volume())
    documents = [call(*arguments, image, "--volume", 1).json, call(*arguments, lone).json]
    assert documents[0]["files"][0]["classes"] == documents[1]["files"][0]["classes"]
    along = call(*arguments, lone, "--axis", 0).json["files"][0]["classes"]
    assert along != documents[1]["files"][0]["classes"]
    done = call("verify", bundle, "--labels", label, "--segmentation", label, "--axis", 1)
    assert done.code == 2
    assert "--axis and --volume are for --images" in done.error


def test_a_dicom_segmentation_of_a_series(bundle: Path) -> None:
    """As labels of the series it was made from, whose slices it mostly leaves out."""
    save(slices(), Path("series"))
    series = read_volume("series")
    labels = np.zeros(series.shape, np.uint8)
    labels[3:9, 2:8, 2:4], labels[10:15, 4:9, 2] = 1, 2
    write_segmentation("label.dcm", labels, series, names=["liver", "spleen"])
    write_segmentation("label.nii.gz", labels, series)
    window = ("--intensity-window", "-200,400", "--json")
    both = [
        call("verify", bundle, "--labels", name, "--images", "series", *window).json
        for name in ("label.dcm", "label.nii.gz")
    ]
    names = [[entry["name"] for entry in document["files"][0]["classes"]] for document in both]
    assert names == [["liver", "spleen"], ["class 1", "class 2"]]
    first, second = ([measured(c) for c in f["files"][0]["classes"]] for f in both)
    for entry, other in zip(first, second, strict=True):
        assert_alike(entry, other)
    same = call("verify", bundle, "--labels", "label.dcm", "--segmentation", "label.nii.gz")
    assert same.code == 0
    assert "1.0000" in same.out
    # A slice alone, as a file: its labels as a picture, and from the segmentation object.
    png("slice.png", labels[..., 2].T)
    lone = Path("alone.dcm")
    shutil.copy(series.slices.headers[2].path, lone)  # type: ignore[attr-defined]
    flat = call("verify", bundle, "--labels", "slice.png", "--images", lone, *window).json
    assert flat["files"][0]["unit"] == "mm"
    assert [c["label_pixels"] for c in flat["files"][0]["classes"]] == [36, 25]
    single = np.zeros_like(labels)
    single[..., 2] = labels[..., 2]
    write_segmentation("single.dcm", single, series)
    there = call("verify", bundle, "--labels", "single.dcm", "--images", lone, *window).json
    for entry, other in zip(flat["files"][0]["classes"], there["files"][0]["classes"], strict=True):
        assert_alike(measured(entry), measured(other))


def test_classes_have_masks_of_their_own(bundle_of) -> None:
    """A network with two classes: label 2 is measured against mask 1."""
    bundle = bundle_of("medsa_2d_box_mask_two_classes")
    image = png("image.png", IMAGE)
    result = call("verify", bundle, "--labels", png("l.png", LABELS), "--images", image, "--json")
    with load(bundle) as session:
        embedding = session.encode(read_image(image))
        for label in (1, 2):
            box = box_around(LABELS == label)
            mask = session.segment(embedding, box=box).masks[0, label - 1]
            assert result.json["files"][0]["classes"][label - 1]["segmented_pixels"] == mask.sum()
    third = png("third.png", np.asarray(LABELS * 3))
    refused = call("verify", bundle, "--labels", third, "--images", image)
    assert refused.code == 2
    assert "has 2 classes" in refused.error


@pytest.mark.parametrize("prompt", ["box", "click", "clicks3"])
def test_a_chunk_has_one_prompt_set(bundle_3d: Path, prompt: str) -> None:
    """A box around the label in the whole chunk; clicks where the chunk is most wrong."""
    labels = volume_labels()
    image, label = nifti("v.nii.gz", volume()), nifti("l.nii.gz", labels)
    arguments = ("--labels", label, "--images", image, "--prompt", prompt, "--json")
    document = call("verify", bundle_3d, *arguments).json
    masks = np.zeros(labels.shape, bool)
    with load(bundle_3d) as session:
        for chunk in (range(4), range(4, 8)):
            within = [min(k, 5) for k in chunk]
            truth = np.stack([labels[..., k] == 1 for k in within])
            prompts: dict[str, Any] = {"box": box_around(truth.any(axis=0))}
            embeddings = session.encode_slices([volume()[..., k] for k in within])
            inside, points, signs = np.zeros_like(truth), [], []
            for _ in range({"box": 1, "click": 1, "clicks3": 3}[prompt]):
                if prompt != "box":
                    click = next_click(truth[: 6 - chunk[0]], inside[: 6 - chunk[0]])
                    assert click is not None
                    points.append(click[0])
                    signs.append(click[1])
                    prompts = {"points": points, "labels": signs}
                inside = np.stack([session.segment(e, **prompts).masks[0, 0] for e in embeddings])
            if prompt == "box":
                inside &= truth.any(axis=(1, 2), keepdims=True)
            for k, mask in zip(chunk, inside, strict=True):
                if k < 6:
                    masks[..., k] = mask
    expected = figures(labels == 1, masks, (0.8, 0.7, 5.0))
    assert measured(document["files"][0]["classes"][0]) == expected


def test_an_empty_mask_has_no_distance(bundle: Path) -> None:
    arguments = ("--labels", png("a.png", LABELS), "--segmentation", png("b.png", LABELS * 0))
    result = call("verify", bundle, *arguments, "--json")
    for entry in result.json["files"][0]["classes"]:
        assert (entry["dice"], entry["hd95"]) == (0, None)
        assert entry["hd95_undefined"] == "the segmentation is empty"
    assert result.json["summary"][0]["hd95"] is None
    assert result.json["summary"][0]["hd95_undefined"] == 2
    assert "NaN" not in result.out
    assert "Infinity" not in result.out
    assert "the segmentation is empty" in call("verify", bundle, *arguments).out


def test_a_folder_reports_what_cannot_be_measured(bundle: Path) -> None:
    png("labels/a.png", LABELS), png("labels/b.png", LABELS[:50]), png("labels/c.png", LABELS * 0)
    for name in "abc":
        png(f"images/{name}.png", IMAGE)
    done = call("verify", bundle, "--labels", "labels", "--images", "images", "--json")
    assert done.code == 2
    a, b, c = done.json["files"]
    assert len(a["classes"]) == 2
    assert "labels/b.png has shape (50, 130), images/b.png (90, 130)" in b["error"]
    assert c["note"] == "no labels, so no prompts"
    assert done.json["summary"][0]["count"] == 2
    assert (
        "labels/b.png has shape"
        in call("verify", bundle, "--labels", "labels", "--images", "images").err
    )


def test_a_least_dice_is_asked_for(bundle: Path) -> None:
    arguments = ("--labels", png("a.png", LABELS), "--segmentation", png("b.png", MOVED))
    mean = call("verify", bundle, *arguments, "--json").json["summary"][0]["dice"]["mean"]
    for least, code in ((mean - 1e-3, 0), (mean + 1e-3, 1)):
        done = call("verify", bundle, *arguments, "--min-dice", least)
        assert done.code == code
        assert ("mean Dice" in done.err) == (code == 1)


def test_neither_torch_nor_the_checkpoint_is_needed(bundle: Path) -> None:
    png("labels/a.png", LABELS), png("images/a.png", IMAGE)
    without = ("torch", "onnx", "segment_anything", "pydicom", "highdicom")
    arguments = ("verify", bundle, "--labels", "labels", "--images", "images")
    assert start(*arguments, without=without).code == 0
    refused = start(*arguments, without=(*without, "scipy"))
    assert refused.code == 2
    assert "medsa-deploy[metrics]" in refused.error


def test_names_come_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    named = copied(bundle, tmp_path)
    edit_manifest(named, conventions__class_names=["polyp"])
    arguments = ("--labels", png("a.png", LABELS), "--segmentation", png("b.png", MOVED))
    document = call("verify", named, *arguments, "--json").json
    assert [entry["name"] for entry in document["files"][0]["classes"]] == ["polyp", "class 2"]


def problems() -> dict[str, tuple[list[object], str]]:
    """Arguments after the bundle, and what the one line of error says."""
    label, image = png("a.png", LABELS), png("images/a.png", IMAGE)
    png("labels/z.png", LABELS)
    shifted = AFFINE + np.eye(4, k=3) * 2
    moved = nifti("moved.nii", volume_labels(), shifted)
    vol, vol_label = nifti("v.nii", volume()), nifti("l.nii", volume_labels())
    short = nifti("short.nii", volume_labels()[:-1])
    soft = nifti("soft.nii", volume_labels() / np.float32(3))
    empty = png("empty.png", LABELS * 0)
    return {
        "nothing to compare": (["--labels", label], "--segmentation"),
        "two things": (["--labels", label, "--segmentation", label, "--images", image], "one"),
        "checkpoint": (
            ["--labels", label, "--images", image, "--checkpoint", label],
            "do not go",
        ),
        "no labels": (["--min-dice", "0.5"], "--labels"),
        "prompt": (["--labels", label, "--segmentation", label, "--prompt", "box"], "--images"),
        "least": (["--labels", label, "--segmentation", label, "--min-dice", "80"], "0 to 1"),
        "affine": (["--labels", moved, "--images", vol], "moved.nii and v.nii do not lie"),
        "affines": (["--labels", moved, "--segmentation", vol_label], "l.nii and moved.nii do not"),
        "shape": (["--labels", short, "--images", vol], "short.nii has shape (63, 48, 6)"),
        "soft": (["--labels", soft, "--images", vol], "whole numbers"),
        "empty": (["--labels", empty, "--images", image], "empty.png is empty"),
        "empties": (["--labels", empty, "--segmentation", empty], "empty.png is empty"),
        "unmatched": (["--labels", "labels", "--images", "images"], "no image for z.png"),
        "kinds": (["--labels", "labels", "--images", image], "two of a kind"),
        "one folder": (["--labels", "labels", "--images", "labels"], "folder of their own"),
        "missing": (["--labels", "gone.png", "--images", image], "gone.png does not exist"),
        "size": (["--labels", png("s.png", LABELS[1:]), "--images", image], "s.png has shape"),
        "precision": (["--labels", label, "--images", image, "--precision", "fp1"], "fp1"),
    }


@pytest.mark.parametrize(
    "name",
    ["nothing to compare", "two things", "checkpoint", "no labels", "prompt", "least", "affine",
     "affines", "shape", "soft", "empty", "empties", "unmatched", "kinds", "one folder", "missing",
     "size", "precision"],
)  # fmt: skip
def test_problems_are_one_line(bundle: Path, name: str) -> None:
    arguments, message = problems()[name]
    done = call("verify", bundle, *arguments)
    assert done.code == 2
    assert message in done.error


def test_names_are_matched_without_endings() -> None:
    for folder, names in (
        ("labels", ("a.nii.gz", "b_seg.png", "case 1_label.npy", "IM.7.dcm")),
        ("images", ("a_0000.nii.gz", "b.png", "case 1.PNG", "IM.7.dcm", "more.png")),
    ):
        Path(folder).mkdir()
        for name in names:
            Path(folder, name).touch()
    pairs, unlabelled = pair_files(Path("labels"), Path("images"), "image")
    assert {a.name: b.name for a, b in pairs} == {
        "a.nii.gz": "a_0000.nii.gz",
        "b_seg.png": "b.png",
        "case 1_label.npy": "case 1.PNG",
        "IM.7.dcm": "IM.7.dcm",
    }
    assert [path.name for path in unlabelled] == ["more.png"]
    Path("labels/b.png").touch()
    with pytest.raises(Exception, match=r"b.png and b_seg.png both stand for 'b'"):
        pair_files(Path("labels"), Path("images"), "image")
