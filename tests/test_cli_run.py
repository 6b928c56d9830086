"""`medsa-deploy run`: images of every format in; masks, overlays and logits out, or one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from command_line import accept_changes, call, contents, copied, edit_manifest, start

from medsa_deploy import load, read_image
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.runtime import Session

HEIGHT, WIDTH = 90, 130
COLOUR = seeded_image(WIDTH, 3)[:HEIGHT]
GREY = COLOUR[..., 0]
CT = GREY.astype(np.int16) * 8 - 1024
PROMPT = ("--point", "60,40", "--box", "10,10,120,80")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own for every test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def expected(bundle: Path, image, **prompt) -> np.ndarray:
    """The mask that Session gives for PROMPT."""
    with load(bundle) as session:
        request = prompt or {"points": [(60, 40)], "box": (10, 10, 120, 80)}
        return session.segment(session.encode(image), **request).masks[0, 0]


def dicom(pixels: np.ndarray, path: Path) -> Path:
    """A CT slice: stored values −1024, slope 1, window 40/400."""
    import pydicom.data
    import pydicom.uid

    file = pydicom.data.get_testdata_file("CT_small.dcm", download=False)
    dataset = pydicom.dcmread(file)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = (pixels + 1024).astype("<i2").tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.WindowCenter, dataset.WindowWidth = "40", "400"
    dataset.save_as(path)
    return path


def nifti(volume: np.ndarray, path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.8, 0.8, 5, 1])), path)
    return path


def picture(pixels: np.ndarray, path: Path, **options) -> Path:
    PIL.Image.fromarray(pixels).save(path, **options)
    return path


def array(values: np.ndarray, path: Path) -> Path:
    np.save(path, values)
    return path


FORMATS: dict[str, Callable[[], Path]] = {
    "grey.png": lambda: picture(GREY, Path("grey.png")),
    "colour.png": lambda: picture(COLOUR, Path("colour.png")),
    "16-bit.png": lambda: picture(GREY.astype(np.uint16) * 200, Path("16-bit.png")),
    "photo.jpg": lambda: picture(COLOUR, Path("photo.jpg"), quality=95),
    "scan.tif": lambda: picture(GREY.astype(np.uint16) * 9, Path("scan.tif")),
    "screen.bmp": lambda: picture(COLOUR, Path("screen.bmp")),
    "array.npy": lambda: array(CT.astype(np.float32), Path("array.npy")),
    "slice.dcm": lambda: dicom(CT, Path("slice.dcm")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_images_of_every_format(bundle: Path, name: str) -> None:
    path = FORMATS[name]()
    done = call("run", bundle, path, *PROMPT, "-o", "mask.png", "--json")
    assert done.code == 0, done.err
    mask = np.asarray(PIL.Image.open("mask.png"))
    reference = expected(bundle, read_image(path))
    assert reference.any()
    assert mask.dtype == np.uint8
    assert (mask == reference * 255).all()
    assert done.json["image_size"] == [HEIGHT, WIDTH]
    assert done.json["pixels"] == {"mask": int(reference.sum())}
    windowed = name in ("16-bit.png", "scan.tif", "array.npy")
    assert (done.json["intensity_window"] is not None) == windowed
    assert ("without a window" in done.err) == windowed


@pytest.mark.parametrize(("axis", "index"), [(2, 3), (0, 50)])
def test_a_slice_of_a_nifti_and_its_mask_in_the_same_geometry(
    bundle: Path, axis: int, index: int
) -> None:
    volume = np.stack([np.roll(CT, 3 * k, axis=1) for k in range(WIDTH)], axis=2)
    nifti(volume, Path("volume.nii.gz"))
    arguments = ["--axis", axis, "--slice", index, "--intensity-window", "-1024,1000"]
    done = call("run", bundle, "volume.nii.gz", "--point", "60,40", *arguments, "-o", "mask.nii.gz")
    assert done.code == 0, done.err
    mask = nibabel.load("mask.nii.gz")
    assert mask.shape == volume.shape
    np.testing.assert_allclose(mask.affine, np.diag([0.8, 0.8, 5, 1]), rtol=1e-6)
    with load(bundle) as session:
        plane = np.take(volume, index, axis)
        embedding = session.encode(plane, intensity_window=(-1024, 1000))
        expected = session.segment(embedding, points=[(60, 40)]).masks[0, 0]
    values = np.asanyarray(mask.dataobj)
    assert (np.take(values, index, axis) == expected).all()
    assert values.sum() == expected.sum() > 0


def test_the_window_given_is_the_one_reported(bundle: Path) -> None:
    dicom(CT, Path("slice.dcm"))
    default = call("run", bundle, "slice.dcm", *PROMPT, "--json").json
    chosen = call("run", bundle, "slice.dcm", *PROMPT, "--intensity-window", "-175,250", "--json")
    assert default["intensity_window"] is None, "the file's own window was used"
    assert chosen.json["intensity_window"] == [-175, 250]
    assert chosen.json["scores"] != default["scores"]


@pytest.mark.parametrize("name", ["mask.png", "mask.npy", "mask.nii", "mask.nii.gz"])
def test_masks_of_every_format(bundle: Path, name: str) -> None:
    picture(COLOUR, Path("image.png"))
    assert call("run", bundle, "image.png", *PROMPT, "-o", name).code == 0
    reference = expected(bundle, COLOUR)
    if name == "mask.png":
        assert (np.asarray(PIL.Image.open(name)) == reference * 255).all()
    elif name == "mask.npy":
        assert np.load(name).dtype == np.bool_
        assert (np.load(name) == reference).all()
    else:
        assert (np.asanyarray(nibabel.load(name).dataobj)[..., 0] == reference).all()


def test_what_is_written_and_said_without_options(bundle: Path) -> None:
    picture(GREY, Path("image.png"))
    done = call("run", bundle, "image.png", "--point", "60,40", "--point", "5,5,0")
    assert (done.code, done.err) == (0, "")
    assert set(contents(Path())) == {"image.png", "image.png.mask.png"}
    for part in ("image.png", " px", "predicted IoU", "encode", "decode", "→ image.png.mask.png"):
        assert part in done.out


def test_json_is_one_document(bundle: Path) -> None:
    picture(GREY, Path("image.png"))
    outputs = ["-o", "m.png", "--overlay", "o.png", "--save-logits", "l.npy"]
    done = start("run", bundle, "image.png", *PROMPT, *outputs, "--json")
    assert (done.code, done.err) == (0, "")
    document = done.json
    assert document["image"] == "image.png"
    assert (document["mask"], document["overlay"], document["logits"]) == (
        "m.png",
        "o.png",
        "l.npy",
    )
    assert set(document["timings_ms"]) == {"preprocess", "encode", "decode", "postprocess"}
    assert len(document["scores"]) == len(document["scores"][0]) == 1
    assert document["error"] is None


def test_the_overlay_shows_the_mask_and_the_prompts(bundle: Path) -> None:
    picture(GREY, Path("image.png"))
    assert call("run", bundle, "image.png", *PROMPT, "--overlay", "overlay.png").code == 0
    overlay = np.asarray(PIL.Image.open("overlay.png"))
    scale = overlay.shape[0] // HEIGHT
    assert overlay.shape == (HEIGHT * scale, WIDTH * scale, 3)
    plain = np.stack([GREY.repeat(scale, 0).repeat(scale, 1)] * 3, -1)
    for x, y in ((60, 40), (10, 40), (60, 80)):  # the click, and two sides of the box
        place = np.s_[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
        assert (overlay[place] != plain[place]).any()
    assert (overlay[: 5 * scale, -5 * scale :] == plain[: 5 * scale, -5 * scale :]).any()


def test_saved_logits_are_the_mask_prompt_of_a_further_call(bundle: Path) -> None:
    picture(COLOUR, Path("image.png"))
    call("run", bundle, "image.png", "--point", "60,40", "--save-logits", "first.npy")
    done = call(
        "run", bundle, "image.png", "--point", "70,50", "--mask-input", "first.npy", "-o", "m.png"
    )
    assert done.code == 0, done.err
    logits = np.load("first.npy")
    assert logits.shape == (1, 1, 64, 64)
    reference = expected(bundle, COLOUR, points=[(70, 50)], mask=logits)
    assert (np.asarray(PIL.Image.open("m.png")) == reference * 255).all()
    assert (reference != expected(bundle, COLOUR, points=[(70, 50)])).any()


def test_several_boxes_are_several_objects(bundle: Path) -> None:
    picture(COLOUR, Path("image.png"))
    boxes = [(10, 10, 60, 80), (70, 10, 120, 80)]
    arguments = [part for box in boxes for part in ("--box", ",".join(map(str, box)))]
    done = call("run", bundle, "image.png", *arguments, "-o", "m.png", "--json")
    labels = np.asarray(PIL.Image.open("m.png"))
    with load(bundle) as session:
        prediction = session.segment(session.encode(COLOUR), box=boxes)
    assert (labels == prediction.label_map()).all()
    counts = {f"box {i}": int((labels == i).sum()) for i in (1, 2)}
    assert done.json["pixels"] == counts
    assert len(done.json["scores"]) == 2


def test_classes_are_written_as_labels_and_counted_by_name(bundle_of, tmp_path: Path) -> None:
    copy = copied(bundle_of("medsa_2d_box_mask_two_classes"), tmp_path)
    edit_manifest(copy, conventions__class_names=["liver", "spleen"])
    picture(COLOUR, Path("image.png"))
    done = call("run", copy, "image.png", "--point", "60,40", "-o", "m.npy", "--json")
    labels = np.load("m.npy")
    assert labels.dtype == np.uint8
    counts = {name: int((labels == i).sum()) for i, name in enumerate(("liver", "spleen"), 1)}
    assert done.json["pixels"] == counts
    assert all(counts.values())


def test_multimask_writes_the_best_candidate(sam_bundle: Path) -> None:
    picture(COLOUR, Path("image.png"))
    arguments = ["run", sam_bundle, "image.png", "--point", "60,40", "-o", "m.npy", "--json"]
    done = call(*arguments, "--multimask")
    with load(sam_bundle) as session:
        three = session.segment(session.encode(COLOUR), points=[(60, 40)], multimask=True)
    assert (np.load("m.npy") == three.masks[0, three.best[0]]).all()
    np.testing.assert_allclose(done.json["scores"], three.scores, atol=1e-5)
    assert len(call(*arguments).json["scores"][0]) == 1


def test_the_threshold_moves_the_mask(bundle: Path) -> None:
    picture(COLOUR, Path("image.png"))
    counts = [
        call("run", bundle, "image.png", *PROMPT, "--threshold", t, "--json").json["pixels"]["mask"]
        for t in (0.3, 0.5, 0.7)
    ]
    assert counts[0] > counts[1] > counts[2]


# Folders


@pytest.fixture
def frames() -> Path:
    """Three pictures, one of them damaged, and a note."""
    folder = Path("frames")
    folder.mkdir()
    for i in range(3):
        picture(np.roll(COLOUR, 9 * i, axis=1), folder / f"{i}.png")
    damaged = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(damaged[:500])
    (folder / "note.txt").write_text("no image")
    return folder


def test_a_folder_with_a_bad_image(bundle: Path, frames: Path) -> None:
    outputs = ["-o", "masks", "--overlay", "overlays", "--save-logits", "logits"]
    done = call("run", bundle, frames, *PROMPT, *outputs, "--json")
    assert done.code == 2
    good, bad, other = done.json
    assert bad["image"] == "frames/1.png"
    assert "1.png cannot be read as an image" in bad["error"]
    assert bad["mask"] is None
    assert (good["mask"], other["mask"]) == ("masks/0.png.mask.png", "masks/2.png.mask.png")
    assert good["error"] is other["error"] is None
    written = {name for name in contents(Path()) if not name.startswith("frames")}
    assert written == {
        *("masks", "masks/0.png.mask.png", "masks/2.png.mask.png"),
        *("overlays", "overlays/0.png.overlay.png", "overlays/2.png.overlay.png"),
        *("logits", "logits/0.png.logits.npy", "logits/2.png.logits.npy"),
    }
    reference = expected(bundle, COLOUR)
    assert (np.asarray(PIL.Image.open("masks/0.png.mask.png")) == reference * 255).all()


def test_a_folder_without_options(bundle: Path, frames: Path) -> None:
    (frames / "1.png").unlink()
    done = call("run", bundle, frames, "--point", "60,40")
    assert (done.code, done.err) == (0, "")
    assert set(contents(Path("masks"))) == {"0.png.mask.png", "2.png.mask.png"}
    assert done.out.count("→ masks/") == 2


def test_a_folder_of_which_nothing_can_be_segmented(bundle: Path, frames: Path) -> None:
    before = contents(Path())
    done = call("run", bundle, frames, "--point", "500,500")
    assert done.code == 2
    assert done.err.count("error: ") == 3
    assert done.err.count("outside the 130×90 image") == 2
    assert contents(Path()) == before


# What cannot be run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The working folder with good and bad images."""
    picture(GREY, Path("good.png"))
    Path("truncated.png").write_bytes(Path("good.png").read_bytes()[:300])
    Path("text.png").write_text("not an image")
    Path("empty.png").write_bytes(b"")
    Path("notes.txt").write_text("not an image")
    picture(np.full((20, 30), 7, np.uint8), Path("constant.png"))
    nan = np.where(CT > 0, np.nan, CT)
    array(nan, Path("nan.npy"))
    array(np.zeros((4, 5, 6, 7)), Path("four.npy"))
    array(np.arange(7.0), Path("line.npy"))
    array(CT, Path("ct.npy"))
    nifti(np.stack([CT] * 4, axis=2), Path("volume.nii.gz"))
    Path("half.nii.gz").write_bytes(Path("volume.nii.gz").read_bytes()[:900])
    dicom(CT, Path("slice.dcm"))
    Path("half.dcm").write_bytes(Path("slice.dcm").read_bytes()[:9000])
    array(np.zeros((1, 1, 32, 32), np.float32), Path("small-logits.npy"))
    array(np.zeros((3, 64, 64), np.float32), Path("three-logits.npy"))
    array(np.full((64, 64), np.nan, np.float32), Path("nan-logits.npy"))
    array(np.zeros((64, 64), np.int32), Path("whole-logits.npy"))
    np.savez("logits.npz", a=np.zeros((64, 64), np.float32))
    for folder in ("images", "nothing"):
        Path(folder).mkdir()
    picture(GREY, Path("images/a.png"))
    return Path()


def bad(arguments: str, message: str):
    return pytest.param(arguments.split(), message, id=arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # images
        bad("missing.png --point 5,5", "missing.png does not exist"),
        bad("truncated.png --point 5,5", "truncated.png cannot be read as an image"),
        bad("text.png --point 5,5", "text.png is damaged, or a variant of its format"),
        bad("empty.png --point 5,5", "empty.png is an empty file"),
        bad("notes.txt --point 5,5", "notes.txt is not a known image"),
        bad("constant.png --point 5,5", "constant.png: every pixel is 7: nothing to segment"),
        bad("nan.npy --point 5,5", "NaN or infinite values"),
        bad("four.npy --point 5,5,1", "four.npy has shape (4, 5, 6, 7); expected"),
        bad("line.npy --point 5,5", "line.npy has shape (7,); expected"),
        bad("volume.nii.gz --point 5,5", "5,5: a point in a volume should be x, y, z"),
        bad("volume.nii.gz --slice 4 --point 5,5", "0…3 along axis 2; 4 was given"),
        bad("volume.nii.gz --slice -1 --point 5,5", "0…3 along axis 2; -1 was given"),
        bad("volume.nii.gz --axis 3 --slice 0 --point 5,5", "there is no axis 3"),
        bad("good.png --slice 0 --point 5,5", "good.png is a single image"),
        bad("half.nii.gz --slice 0 --point 5,5", "half.nii.gz cannot be read as NIfTI"),
        bad("half.dcm --point 5,5", "half.dcm cannot be read as DICOM"),
        bad("nothing --point 5,5", "nothing holds no images"),
        bad("ct.npy --point 5,5 --intensity-window 5000,6000", "lie outside the intensity window"),
        # prompts
        bad("good.png", "no prompt: give --point X,Y"),
        bad("good.png --point 130,5", "point 1 (130, 5) lies outside the 130×90 image"),
        bad("good.png --point 5,5 --point 5,-1", "point 2 (5, -1) lies outside"),
        bad("good.png --box 90,20,10,80", "is empty or inverted: give x0, y0, x1, y1"),
        bad("good.png --box 10,20,10,80", "is empty or inverted"),
        bad("good.png --box 10,20,131,80", "lies outside the 130×90 image"),
        bad("good.png --mask-input missing.npy", "missing.npy does not exist: --mask-input takes"),
        bad("good.png --mask-input good.png", "good.png is not a .npy file of logits"),
        bad("good.png --mask-input logits.npz", "logits.npz is not a .npy file of logits"),
        bad("good.png --mask-input empty.png", "empty.png is not a .npy file of logits"),
        bad("good.png --mask-input nothing", "nothing does not exist: --mask-input takes"),
        bad("good.png --mask-input small-logits.npy", "(32, 32), expected (64, 64)"),
        bad("good.png --mask-input three-logits.npy", "expected float logits (4g, 4g)"),
        bad("good.png --mask-input whole-logits.npy", "holds int32 of shape (64, 64)"),
        bad("good.png --mask-input nan-logits.npy", "NaN"),
        bad("images --point 5,5 --mask-input missing.npy", "missing.npy does not exist"),
        # outputs
        bad("good.png --point 5,5 -o nowhere/m.png", "nowhere is not a folder: make it"),
        bad("good.png --point 5,5 --overlay nowhere/o.png", "nowhere is not a folder"),
        bad("good.png --point 5,5 --save-logits nowhere/l.npy", "nowhere is not a folder"),
        bad("good.png --point 5,5 -o m.gif", "m.gif: no mask can be written as '.gif'"),
        bad("good.png --point 5,5 -o m", "m: no mask can be written as ''"),
        bad("good.png --point 5,5 --overlay o.bmp", "no overlay can be written as '.bmp'"),
        bad("good.png --point 5,5 --save-logits l.png", "l.png: logits are written as .npy"),
        bad("good.png --point 5,5 -o images", "images is a folder: name a file"),
        bad("good.png --point 5,5 -o good.png", "good.png is the input image"),
        bad("good.png --point 5,5 -o ./images/../good.png", "is the input image"),
        bad("good.png --point 5,5 -o x.png --overlay x.png", "two outputs have the same name"),
        bad("good.png --point 5,5 -o x.png --overlay ./images/../x.png", "the same name"),
        bad(
            "good.png --point 5,5 --mask-input small-logits.npy -o small-logits.npy",
            "is the mask prompt",
        ),
        bad("images --point 5,5 -o good.png", "good.png is a file; for a folder of images"),
        bad("images --point 5,5 -o m.png", "m.png looks like a file; for a folder of images"),
        bad("images --point 5,5 -o nowhere/masks", "nowhere is not a folder: make it first"),
        bad("images --point 5,5 -o images", "images is the input folder: name another"),
        # options
        bad("good.png --point 5,5 --threshold 0", "the threshold 0 is not a probability"),
        bad("good.png --point 5,5 --threshold 1.5", "the threshold 1.5 is not a probability"),
        bad("images --point 5,5 --threshold 1.5", "the threshold 1.5 is not a probability"),
        bad("good.png --point 5,5 --multimask", "multimask is for SAM's outputs"),
        bad("good.png --point 5,5 --threads 0", "threads is 0, expected a whole number from 1 to"),
        bad("good.png --point 5,5 --threads 1000000000000", "expected a whole number from 1 to"),
        bad("good.png --point 5,5 --backend cuda", "unknown backend 'cuda'; there are:"),
        bad("good.png --point 5,5 --precision int8", "has no encoder in int8; it has: fp32"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    bundle: Path, files: Path, arguments: list[str], message: str
) -> None:
    before = contents(files)
    done = call("run", bundle, *arguments, "--json")
    assert done.code == 2, done.err
    assert message in done.error
    assert contents(files) == before


def other_version(copy: Path) -> None:
    edit_manifest(copy, schema=99)


def unknown_field(copy: Path) -> None:
    edit_manifest(copy, colour="blue")


def truncated_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])


def changed_byte(copy: Path) -> None:
    content = bytearray((copy / "decoder.onnx").read_bytes())
    content[-10] ^= 1
    (copy / "decoder.onnx").write_bytes(content)


def truncated_graph(copy: Path) -> None:
    content = (copy / "encoder.onnx").read_bytes()
    (copy / "encoder.onnx").write_bytes(content[: len(content) // 2])


def missing_graph(copy: Path) -> None:
    (copy / "decoder.onnx").unlink()


def no_graph(copy: Path) -> None:
    (copy / "encoder.onnx").write_text("onnx")
    accept_changes(copy)


def outside(copy: Path) -> None:
    edit_manifest(copy, files__0__path="../encoder.onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_version, "schema version 99; this medsa-deploy reads version"),
        (unknown_field, "unknown fields: colour"),
        (truncated_manifest, "is not JSON"),
        (changed_byte, "decoder.onnx is not the file the manifest describes"),
        (truncated_graph, "encoder.onnx is not the file the manifest describes"),
        (missing_graph, "which its manifest lists"),
        (no_graph, "encoder.onnx is not a graph ONNX Runtime can load"),
        (outside, "outside the bundle"),
    ],
)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_damaged_bundle_is_one_line(
    bundle: Path, tmp_path: Path, files: Path, command: str, damage: Callable, message: str
) -> None:
    copy = copied(bundle, tmp_path)
    damage(copy)
    before = contents(files)
    done = call(command, copy, *(["good.png", "--point", "5,5"] if command == "run" else []))
    assert done.code == 2, done.err
    assert message in done.error
    assert contents(files) == before


@pytest.mark.parametrize("name", ["missing.medsa", "good.png", "images"])
def test_what_is_no_bundle_is_one_line(files: Path, name: str) -> None:
    done = call("run", name, "good.png", "--point", "5,5")
    assert done.code == 2
    assert name in done.error


def test_a_backend_that_fails_is_a_runtime_fault(bundle: Path, files: Path, monkeypatch) -> None:
    before = contents(files)
    monkeypatch.setattr(
        "medsa_deploy.runtime.backends.onnxruntime_cpu.OnnxRuntimeBackend.encode",
        lambda self, image: np.full((1, 256, 16, 16), np.nan, np.float32),
    )
    done = call("run", bundle, "good.png", "--point", "5,5")
    assert done.code == 3
    assert "gave an embedding with NaN or Inf" in done.error
    assert contents(files) == before


def test_all_outputs_are_written_or_none(bundle: Path, files: Path, monkeypatch) -> None:
    before = contents(files)

    def interrupted(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    targets = ("-o", "mask.png", "--overlay", "o.png", "--save-logits", "l.npy")
    for name in ("write_mask", "_write_overlay"):
        with monkeypatch.context() as patched:
            patched.setattr(f"medsa_deploy.stages.run.images.{name}", interrupted)
            done = call("run", bundle, "good.png", "--point", "5,5", *targets)
        assert done.code == 2
        assert contents(files) == before


def test_what_was_made_from_images_is_no_image_of_a_folder(bundle: Path, files: Path) -> None:
    import pydicom.data

    Path("one").mkdir()
    dicom(CT, Path("one/a.dcm"))
    segmentation = pydicom.data.get_testdata_file("liver_1frame.dcm", download=False)
    shutil.copy(segmentation, "one/seg.dcm")
    done = call("run", bundle, "one", "--point", "5,5", "-o", "masks", "--json")
    assert done.code == 0, done.err
    assert [path.name for path in Path("masks").iterdir()] == ["a.dcm.mask.png"]
    Path("one/a.dcm").unlink()
    done = call("run", bundle, "one", "--point", "5,5", "-o", "masks")
    assert done.code == 2
    assert "one holds only files derived from images" in done.error


def test_a_slice_for_a_3d_network_is_one_line(bundle_3d: Path, files: Path) -> None:
    done = call("run", bundle_3d, "volume.nii.gz", "--slice", 1, "--point", "5,5")
    assert done.code == 2
    assert "give it a volume, and prompts in voxels (without --slice)" in done.error


def test_an_overlay_that_fails_leaves_no_half_written_file(
    bundle: Path, files: Path, monkeypatch
) -> None:
    before = contents(files)

    def stop(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", stop)
    done = call("run", bundle, "good.png", "--point", "5,5", "-o", "mask.png")
    assert done.code == 2
    assert "No space left on device" in done.error
    assert contents(files) == before


def test_a_session_is_closed_when_a_run_fails(bundle: Path, files: Path, monkeypatch) -> None:
    closed = []
    close = Session.close
    monkeypatch.setattr(Session, "close", lambda self: closed.append(close(self)))
    assert call("run", bundle, "good.png", "--point", "500,5").code == 2
    assert closed == [None]
