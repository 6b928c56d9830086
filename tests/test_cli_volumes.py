"""`medsa-deploy run` on volumes: outputs, JSON, progress, interrupts; bad input in one line."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from command_line import Done, call, command, contents
from dicom_series import back, save, slices
from test_interrupt import assert_interrupted, begun, ended, wait_for

from medsa_deploy import load
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.images import read_image, read_volume
from medsa_deploy.runtime import Structure, VolumeOptions, segment_volume
from medsa_deploy.stages.run import volumes

SHAPE = (40, 50, 6)
BOX = ("--box", "5,8,1,35,45,4")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a volume, ct.nii.gz."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    nifti("ct.nii.gz", ct(SHAPE[2]))
    return folder


def ct(count: int) -> np.ndarray:
    """(40, 50, count) int16"""
    planes = [seeded_image(50, [3, i])[:40, :, 0] for i in range(count)]
    return np.stack(planes, axis=2).astype(np.int16) * 8 - 1024


def nifti(name: str, array: np.ndarray) -> Path:
    affine = np.diag([0.8, 0.8, 5, 1])
    affine[:3, 3] = 3, 4, 5
    nibabel.save(nibabel.Nifti1Image(array, affine), name)
    return Path(name)


def test_a_label_map_as_segment_volume_gives_it(bundle_3d: Path, workplace: Path) -> None:
    arguments = [*BOX, "--point", "20,20,2", "--point", "1,1,2,0", "--overlap", 1, "--threads", 2]
    arguments += ["--intensity-window", "-1024,1000", "--threshold", "0.45"]
    done = call("run", bundle_3d, "ct.nii.gz", *arguments, "--overlay", "o.png", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    volume = read_volume("ct.nii.gz")
    structure = Structure(
        points=((20, 20, 2), (1, 1, 2)), labels=(1, 0), boxes=((5, 8, 1, 35, 45, 4),)
    )
    options = VolumeOptions(intensity_window=(-1024, 1000), threshold=0.45, overlap=1)
    with load(bundle_3d, threads=2) as session:
        expected = segment_volume(session, volume, [structure], options)
    written = nibabel.load("ct.nii.gz.seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected.labels)
    np.testing.assert_array_equal(written.affine, volume.affine)
    document = done.json
    assert document["mask"] == "ct.nii.gz.seg.nii.gz"
    assert document["overlay"] == "o.png"
    assert (document["shape"], document["axis"], document["slices"]) == ([40, 50, 6], 2, [1, 2, 3])
    assert document["intensity_window"] == [-1024, 1000]
    counts = np.bincount(expected.labels.ravel(), minlength=3)
    for label, name in ((1, "class 1"), (2, "class 2")):
        assert document["labels"][label - 1] == {
            "label": label,
            "name": name,
            "voxels": counts[label],
            "millilitres": pytest.approx(counts[label] * 0.8 * 0.8 * 5 / 1000),
        }
    assert set(document["timings_ms"]) == {"encode", "decode"}
    assert document["seconds"] > 0
    with PIL.Image.open("o.png") as picture:
        assert picture.size[0] == 3 * 512 + 2 * 8
    assert sorted(path.name for path in workplace.iterdir()) == [
        "ct.nii.gz",
        "ct.nii.gz.seg.labels.json",
        "ct.nii.gz.seg.labels.txt",
        "ct.nii.gz.seg.nii.gz",
        "o.png",
    ]


def test_a_table_for_people(bundle: Path, workplace: Path) -> None:
    prompts = {"structures": [{"name": "[b]Leber", "boxes": [[5, 8, 1, 35, 45, 2]]}]}
    Path("prompts.json").write_text(json.dumps(prompts))
    done = call(
        "run", bundle, "ct.nii.gz", "--prompts", "prompts.json", "--propagate", "--margin", 1
    )
    assert done.code == 0, done.err
    assert "40×50×6 voxels, " in done.out
    assert "of 6 slices along axis 2 segmented in" in done.out
    assert "[b]Leber" in done.out
    assert "→ ct.nii.gz.seg.nii.gz" in done.out
    assert "int16 intensities without a window were stretched" in done.err
    assert done.err.count("\n") == 1


def test_a_series_becomes_a_dicom_segmentation(bundle: Path, workplace: Path) -> None:
    save(slices(3), workplace / "series")
    arguments = ["--point", "8,6,1", "--propagate", "--threshold", "0.2", "-o", "seg.dcm"]
    done = call("run", bundle, "series", *arguments, "--json")
    assert done.code == 0, done.err
    counted = done.json["labels"][0]["voxels"]
    labels = back(Path("seg.dcm"), read_volume("series"))
    assert counted == np.count_nonzero(labels)


def test_a_series_stays_a_volume_with_its_outputs_beside_it(bundle: Path, workplace: Path) -> None:
    save(slices(3), workplace / "series")
    arguments = ["series", "--box", "2,2,0,14,10,2", "--overlay", "series/o.png"]
    for _ in range(2):
        done = call("run", bundle, *arguments, "-o", "series/mask.nii.gz", "--json")
        assert done.code == 0, done.err
        assert done.json["slices"] == [0, 1]


def test_a_tilted_voxel_is_as_large_as_its_slices_are_apart(bundle: Path, workplace: Path) -> None:
    save(slices(3, step=np.array([0, 1.5, 2.5])), workplace / "tilted")
    done = call("run", bundle, "tilted", "--box", "2,2,0,14,10,2", "--threshold", "0.1", "--json")
    (label,) = done.json["labels"]
    assert label["voxels"] > 0
    assert label["millilitres"] == pytest.approx(label["voxels"] * 0.8 * 0.6 * 2.5 / 1000)


def test_an_overlay_that_fails_leaves_no_mask(
    bundle: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = contents(workplace)
    monkeypatch.setattr(volumes, "write_montage", interrupted)
    structure = Structure(boxes=((5, 8, 1, 35, 45, 4),))
    with load(bundle) as session, pytest.raises(KeyboardInterrupt):
        volumes.segment_volume_file(
            session, Path("ct.nii.gz"), [structure], VolumeOptions(), overlay=Path("o.png")
        )
    assert contents(workplace) == before


@pytest.mark.parametrize("option", ["-o", "--overlay"])
def test_outputs_that_cannot_be_written_are_refused_first(
    bundle: Path, workplace: Path, option: str
) -> None:
    for path, message in (
        ("/dev/null", "/dev/null is not a regular file"),
        ("gone/a.nii.gz", "gone is not a folder"),
        (".", ". is a folder"),
    ):
        done = call("run", bundle, "ct.nii.gz", *BOX, option, path)
        assert done.code == 2
        assert message in done.error


def test_one_volume_of_a_4d_nifti(bundle: Path, workplace: Path) -> None:
    nifti("4d.nii.gz", np.stack([ct(6), ct(6)[::-1]], axis=-1))
    arguments = ["--point", "8,6,1", "--json"]
    done = call("run", bundle, "4d.nii.gz", *arguments)
    assert done.code == 2
    assert "(40, 50, 6, 2): choose one of its volumes (--volume) 0…1; none was given" in done.error
    both = []
    for number in (0, 1):
        done = call(
            "run", bundle, "4d.nii.gz", *arguments, "--volume", number, "-o", f"{number}.nii"
        )
        assert done.code == 0, done.err
        both.append(np.asarray(nibabel.load(f"{number}.nii").dataobj))
    assert (both[0] != both[1]).any()


BAD = {
    "gone.nii.gz": ([], "gone.nii.gz does not exist"),
    "gone.nii": (["--propagate"], "gone.nii does not exist"),
    "empty": ([], "empty holds no images"),
    "nothing.nii.gz": ([], "nothing.nii.gz is an empty file"),
    "cut.nii.gz": ([], "cut.nii.gz cannot be read as NIfTI"),
    "text.nii": ([], "text.nii cannot be read as NIfTI"),
    "air.nii.gz": ([], "air.nii.gz: every voxel is -1024: nothing to segment"),
    "short.nii.gz": ([], "short.nii.gz has 3 slices along axis 2; this network sees 4 at a time"),
    "gap": ([], "gap: between b.dcm and d.dcm there are 5 mm, elsewhere 2.5 mm (1 missing)"),
    "sizes": ([], "sizes mixes image sizes: 16×12 in 5 images, 32×6 in c.dcm"),
    "4d.nii.gz": ([], "choose one of its volumes (--volume) 0…1; none was given"),
    "flat.png": ([], "--point 9,9,2: expected X,Y or X,Y,LABEL with label 1 or 0 in an image"),
    "photo.png": (["--point", "9,9"], "this network sees 4 neighbouring slices at a time"),
    "nan.npy": ([], "nan.npy: slice 4 has 1 NaN or infinite value"),
}  # fmt: skip
"""File or folder → options, and what is said of it."""


def make(name: str) -> None:
    """The file or folder of a case."""
    if name == "empty":
        Path(name).mkdir()
    elif name == "nothing.nii.gz":
        Path(name).touch()
    elif name == "cut.nii.gz":
        Path(name).write_bytes(Path("ct.nii.gz").read_bytes()[:900])
    elif name == "text.nii":
        Path(name).write_text("no volume at all " * 99)
    elif name == "air.nii.gz":
        nifti(name, np.full(SHAPE, -1024, np.int16))
    elif name == "short.nii.gz":
        nifti(name, ct(3))
    elif name == "4d.nii.gz":
        nifti(name, np.stack([ct(6)] * 2, axis=-1))
    elif name.endswith(".png"):
        PIL.Image.fromarray(seeded_image(40, 1)).save(name)
    elif name == "nan.npy":
        array = ct(6).astype(np.float32).transpose(2, 0, 1)
        array[4, 3, 2] = np.nan
        np.save(name, array)
    elif name in ("gap", "sizes"):
        datasets = slices(6)
        if name == "sizes":
            datasets[2].Rows, datasets[2].Columns = 6, 32
        save(datasets, Path(name))
        if name == "gap":
            Path("gap/c.dcm").unlink()


@pytest.mark.parametrize("name", BAD)
def test_volumes_that_cannot_be_segmented(bundle_3d: Path, workplace: Path, name: str) -> None:
    make(name)
    options, message = BAD[name]
    click = "4,9,9" if name == "nan.npy" else "9,9,2"  # .npy is sliced along its first axis
    point = [] if "--point" in options else ["--point", click]
    before = contents(workplace)
    done = call("run", bundle_3d, name, *point, *options, "-o", "seg.nii.gz", "--overlay", "o.png")
    assert done.code == 2
    assert message in done.error
    assert contents(workplace) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no prompt: give --point X,Y,Z, --box X0,Y0,Z0,X1,Y1,Z1 or --prompts FILE"),
        (("--point", "9,9"), "9,9: a point in a volume should be x, y, z"),
        (("--point", "9,9,2,7"), "9,9,2,7: a point in a volume should be"),
        (("--point", "9,9,2;1"), "--point 9,9,2;1: expected numbers between commas"),
        (("--point", "9,9,6"), "(9, 9, 6) lies outside the volume: x 0…39, y 0…49, z 0…5"),
        (("--point", "-1,9,2"), "(-1, 9, 2) lies outside the volume"),
        (("--point", "9,9,2.5"), "lies between two slices: give a whole z, 0…5"),
        (("--point", "9,9,2,0"), "the chunk of slices 0…3 has background clicks only"),
        (("--box", "1,2,3,4"), "1,2,3,4: a box in a volume should be x0, y0, z0, x1, y1, z1"),
        (("--box", "1,2,3,9,9,7"), "(1, 2, 3, 9, 9, 7) lies outside the volume: x 0…40"),
        (("--box", "9,2,3,1,9,5"), "is empty or inverted"),
        ((*BOX, *BOX, "--point", "1,1,1"), "points go with one box only, or into --prompts"),
        ((*BOX, "--prompts", "p.json"), "--prompts holds all prompts"),
        (("--prompts", "p.json"), "p.json cannot be read: No such file or directory"),
        ((*BOX, "--overlap", "4"), "an overlap of 4 slices does not fit chunks of 4: 0…3 does"),
        ((*BOX, "--margin", "3"), "add --propagate"),
        ((*BOX, "--propagate", "--margin", "-1"), "a margin of -1 pixels cannot be used"),
        ((*BOX, "--threshold", "2"), "2 is not a probability between 0 and 1"),
        ((*BOX, "--axis", "3"), "there is no axis 3"),
        ((*BOX, "--volume", "1"), "(--volume) 0…0; 1 was given"),
        ((*BOX, "--slice", "1"), "expected X0,Y0,X1,Y1 in an image"),
        (("--box", "1,2,3,4", "--slice", "1"), "sees 4 neighbouring slices at a time"),
        ((*BOX, "--multimask"), "--multimask is for images"),
        ((*BOX, "--save-logits", "l.npy"), "--save-logits is for images"),
        ((*BOX, "--mask-input", "l.npy"), "--mask-input is for images"),
        ((*BOX, "--intensity-window", "5000,6000"), "which shows one flat grey"),
        ((*BOX, "-o", "seg.png"), "no segmentation can be written as '.png'"),
        ((*BOX, "-o", "seg.dcm"), "a DICOM segmentation refers to DICOM images"),
        ((*BOX, "-o", "ct.nii.gz"), "ct.nii.gz is part of the volume itself"),
        ((*BOX, "-o", "none/seg.nii"), "none is not a folder: make it, or name"),
        ((*BOX, "--overlay", "o.nii"), "no overlay can be written as '.nii'"),
    ],
)
def test_options_that_do_not_fit(
    bundle_3d: Path, workplace: Path, options: tuple[str, ...], message: str
) -> None:
    before = contents(workplace)
    done = call("run", bundle_3d, "ct.nii.gz", *options)
    assert done.code == 2
    assert message in done.error
    assert contents(workplace) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "p.json"), "--prompts holds all prompts"),
        (("--propagate",), "--propagate is for volumes"),
        (("--overlap", "1"), "--overlap is for volumes"),
        (("--margin", "1"), "--margin is for volumes"),
        (("--volume", "1"), "--volume is for volumes"),
        (("--box", "1,1,1,9,9,2"), "--box 1,1,1,9,9,2: expected X0,Y0,X1,Y1 in an image"),
    ],
)
def test_options_of_volumes_on_an_image(
    bundle: Path, workplace: Path, options: tuple[str, ...], message: str
) -> None:
    make("flat.png")
    done = call("run", bundle, "flat.png", "--point", "9,9", *options)
    assert done.code == 2
    assert message in done.error


def test_a_prompt_file_for_a_picture(bundle: Path, workplace: Path) -> None:
    """Its mask has a label for each structure; a box alone is that of --box."""
    make("flat.png")
    box = {"name": "square", "boxes": [[4, 5, 0, 20, 22, 1]]}
    point = {"name": "spot", "points": [[9, 9, 0]]}
    for name, structures in (("box", [box]), ("both", [box, point])):
        Path(f"{name}.json").write_text(json.dumps({"structures": structures}))
        done = call(
            *("run", bundle, "flat.png", "--prompts", f"{name}.json", "-o", f"{name}.png"),
            *("--overlay", f"{name}_overlay.png", "--json"),
        )
        assert done.code == 0, done.err
        assert list(done.json["pixels"]) == [entry["name"] for entry in structures]
        assert Path(f"{name}_overlay.png").exists()
    done = call("run", bundle, "flat.png", "--box", "4,5,20,22", "-o", "plain.png")
    assert done.code == 0
    written = {name: read_image(f"{name}.png").pixels for name in ("box", "plain", "both")}
    assert (written["box"] == written["plain"]).all()
    assert set(np.unique(written["both"])) <= {0, 1, 2}
    done = call("run", bundle, "flat.png", "--prompts", "box.json", "--multimask")
    assert "--multimask is for" in done.error


def test_a_slice_of_a_series_is_one_line(bundle: Path, workplace: Path) -> None:
    save(slices(3), workplace / "series")
    done = call("run", bundle, "series", "--point", "9,9", "--slice", 1, "-o", "m.png")
    assert done.code == 2
    assert done.error.startswith("--slice 1 is for a NIfTI or .npy volume; series is a DICOM seri")


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("plane.nii.gz", ("--point", "20,20,0,1"), "seg.nii.gz"),
        ("plane.nii.gz", ("--box", "5,8,0,35,45,1"), "seg.npy"),
        ("plane.nii.gz", ("--point", "20,20,0", "--propagate"), "seg.nii.gz"),
        ("one", ("--point", "8,6,0"), "seg.dcm"),
        ("one", ("--prompts", "p.json"), "seg.nii.gz"),
        ("one/a.dcm", ("--point", "8,6,0"), "seg.dcm"),
        ("picture.npy", ("--box", "1,1,1,40,40,2", "--axis", "2"), "seg.npy"),
    ],
)
def test_one_plane_is_a_volume_of_one_slice_when_it_is_prompted_as_one(
    bundle: Path, workplace: Path, name: str, options: tuple[str, ...], target: str
) -> None:
    nifti("plane.nii.gz", ct(1))
    save(slices(1), workplace / "one")
    np.save("picture.npy", ct(3))
    Path("p.json").write_text('{"structures": [{"points": [[8, 6, 0]]}]}')
    window = ("--intensity-window", "-900,900")
    done = call("run", bundle, name, *options, *window, "-o", target, "--json")
    assert done.code == 0, done.err
    assert len(done.json["slices"]) == 1
    source = read_volume(name, axis=2)
    if target == "seg.dcm":
        labels = back(Path(target), source)
    elif target == "seg.npy":
        labels = np.load(target)
    else:
        labels = np.asarray(nibabel.load(target).dataobj)
    assert labels.shape == source.shape
    assert np.count_nonzero(labels) == done.json["labels"][0]["voxels"]


def test_a_click_on_a_plane_is_never_taken_for_its_label(bundle: Path, workplace: Path) -> None:
    nifti("plane.nii.gz", ct(1))
    done = call("run", bundle, "plane.nii.gz", "--point", "20,20,0", "-o", "m.nii.gz")
    assert done.code == 2
    assert done.error.endswith("in an image a click is X,Y or X,Y,LABEL")


def test_a_2d_network_has_no_overlap(bundle: Path, workplace: Path) -> None:
    done = call("run", bundle, "ct.nii.gz", *BOX, "--overlap", 1)
    assert done.code == 2
    assert "1 slices was given, but this network sees each slice alone: leave it out" in done.error


def test_help_shows_the_schema_of_prompts() -> None:
    done = call("run", "--help")
    assert '{"structures": [' in done.out
    for word in ('"name"', '"class"', '"points"', '"boxes"', "--propagate", "--overlap"):
        assert word in done.out


def on_terminal(*arguments: object) -> Done:
    """A `medsa-deploy` process whose stderr is a terminal; `err` is what it saw."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        seen += more
    os.close(ours)
    assert process.stdout is not None
    out = process.stdout.read().decode()
    process.stdout.close()
    return Done(process.wait(), out, re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", seen.decode()))


def test_progress_is_shown_on_a_terminal_only(bundle: Path, workplace: Path) -> None:
    arguments = [
        "run",
        bundle,
        "ct.nii.gz",
        *BOX,
        "-o",
        "s.nii.gz",
        "--intensity-window",
        "-900,900",
    ]
    shown = on_terminal(*arguments)
    assert shown.code == 0
    assert "3/3 slices" in shown.err
    assert "0:00:0" in shown.err  # time left
    for quiet in (call(*arguments), on_terminal(*arguments, "--json")):
        assert quiet.code == 0
        assert quiet.err.strip() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_volume_leaves_nothing(
    bundle_3d: Path, workplace: Path, number: int
) -> None:
    nifti("long.nii.gz", np.concatenate([ct(6)] * 60, axis=2))
    Path("seg.nii.gz").write_text("an earlier one")
    before = contents(workplace)
    arguments = [
        "--box",
        "5,8,0,35,45,360",
        "--propagate",
        "-o",
        "seg.nii.gz",
        "--overlay",
        "o.png",
    ]
    process = begun("run", bundle_3d, "long.nii.gz", *arguments)
    wait_for("were stretched", process)  # said when the first chunk is read
    time.sleep(0.3)
    assert process.poll() is None
    assert_interrupted(ended(process, number))
    assert contents(workplace) == before
