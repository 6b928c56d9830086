"""run --track: a clip and a prompt in its first frame → masks, a DICOM segmentation, a video."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pydicom
import pytest
from blob_backend import BlobBackend
from clip_files import ultrasound, video
from command_line import call, contents
from dicom_tools import check_iod
from pydicom.dataset import Dataset
from pydicom.uid import UltrasoundMultiFrameImageStorage
from test_interrupt import assert_interrupted, begun, ended

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import ImageError, MissingDependencyError
from medsa_deploy.images import SegmentationDetails
from medsa_deploy.images.clip import open_clip
from medsa_deploy.images.dicom_frame_seg import BitPacker, FrameSegmentation
from medsa_deploy.images.limits import Limits, reading_within
from medsa_deploy.images.segments import segments
from medsa_deploy.runtime import Session

COUNT, SIDE = 6, 256
BOX = "50,50,110,110"


def frames(count: int = COUNT) -> np.ndarray:
    """(count, 256, 256) uint8: a bright square that moves 2 pixels to the right a frame."""
    pixels = np.full((count, SIDE, SIDE), 20, np.uint8)
    for k in range(count):
        pixels[k, 60:100, 60 + 2 * k : 100 + 2 * k] = 230
    return pixels


@pytest.fixture
def blobs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle, whose network segments what is bright within a box."""
    manifest = load_manifest(bundle)
    manifest = replace(manifest, conventions=replace(manifest.conventions, point_order="xy"))
    opened = Session(manifest, BlobBackend(manifest))
    monkeypatch.setattr(stages.SessionOptions, "open", lambda options, path: opened)
    return bundle


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_of(path: Path, pixels: np.ndarray) -> Path:
    path.mkdir()
    for k, picture in enumerate(pixels, 8):  # names whose alphabetical order is another
        PIL.Image.fromarray(picture).save(path / f"frame{k}.png")
    return path


def expected(frame: int) -> np.ndarray:
    return frames()[frame] > 128


def read(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        return np.asarray(picture) > 0


def assert_near(mask: np.ndarray, other: np.ndarray) -> None:
    """Equal but for the edge, which moves by the pixels of a low-resolution logit."""
    assert (mask & other).sum() / (mask | other).sum() > 0.6


def test_a_video_becomes_a_folder_of_masks(blobs: Path, work: Path) -> None:
    clip = video(work / "clip.mkv", frames())
    done = call("run", blobs, clip, "--track", "--box", BOX, "-o", "out", "--json")
    assert done.code == 0, done.err
    assert [frame["frame"] for frame in done.json["frames"]] == [f"{k:05}" for k in range(COUNT)]
    assert [frame["timestamp"] for frame in done.json["frames"]] == pytest.approx(
        [k / 10 for k in range(COUNT)]
    )
    assert not any(frame["lost"] for frame in done.json["frames"])
    assert set(done.json["timings_ms"]) == {"preprocess", "encode", "decode", "postprocess"}
    for k, frame in enumerate(done.json["frames"]):
        mask = read(work / "out" / f"{k:05}.mask.png")
        assert_near(mask, expected(k))
        assert frame["pixels"] == mask.sum()
    assert len(list((work / "out").iterdir())) == COUNT


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(blobs: Path, work: Path) -> None:
    folder = folder_of(work / "frames", frames())
    done = call("run", blobs, folder, "--track", "--point", "80,80", "--json")
    assert done.code == 0, done.err
    names = [frame["frame"] for frame in done.json["frames"]]
    assert names == [f"frame{k}.png" for k in range(8, 8 + COUNT)]
    assert [frame["timestamp"] for frame in done.json["frames"]] == [None] * COUNT
    for k, name in enumerate(names):
        assert_near(read(work / "masks" / f"{name}.mask.png"), expected(k))


def test_an_ultrasound_becomes_a_segmentation_of_its_frames(blobs: Path, work: Path) -> None:
    pixels = frames()
    pixels[3] = 50  # a frame of one grey is lost, and its mask is empty
    clip = ultrasound(work / "us.dcm", pixels)
    done = call("run", blobs, clip, "--track", "--box", BOX, "-o", "seg.dcm", "--json")
    assert done.code == 0, done.err
    reports = done.json["frames"]
    assert [report["lost"] for report in reports] == [k == 3 for k in range(COUNT)]
    assert [report["reacquired"] for report in reports] == [k == 4 for k in range(COUNT)]
    assert [report["timestamp"] for report in reports] == pytest.approx(
        [0.04 * k for k in range(COUNT)]
    )
    segmentation, source = pydicom.dcmread("seg.dcm"), pydicom.dcmread(clip)
    assert segmentation.StudyInstanceUID == source.StudyInstanceUID
    assert str(segmentation.PatientName) == "Doe^Jane"
    numbers = []
    for groups, mask in zip(
        segmentation.PerFrameFunctionalGroupsSequence, segmentation.pixel_array, strict=True
    ):
        (image,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPClassUID == UltrasoundMultiFrameImageStorage
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        numbers.append(image.ReferencedFrameNumber)
        assert groups.FrameContentSequence[0].DimensionIndexValues == [1, numbers[-1]]
        assert_near(mask > 0, expected(numbers[-1] - 1))
    assert numbers == [1, 2, 3, 5, 6]
    (algorithm,) = segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert blobs.name in "".join(algorithm.AlgorithmParameters)
    check_iod(Path("seg.dcm"))


def test_a_segmentation_without_a_pixel_is_valid(blobs: Path, work: Path) -> None:
    clip = ultrasound(work / "us.dcm", frames(2))
    done = call(
        "run", blobs, clip, "--track", "--box", "200,200,240,240", "-o", "seg.dcm", "--json"
    )
    assert done.code == 0, done.err
    assert all(frame["lost"] for frame in done.json["frames"])
    segmentation = pydicom.dcmread("seg.dcm")
    assert (segmentation.NumberOfFrames, segmentation.pixel_array.sum()) == (1, 0)
    check_iod(Path("seg.dcm"))


def test_frames_of_an_odd_number_of_bits_follow_one_another() -> None:
    masks = np.random.default_rng(0).random((5, 7, 9)) > 0.5
    packer = BitPacker()
    for mask in masks:
        packer.add(mask)
    bits = np.unpackbits(np.frombuffer(packer.content(), np.uint8), bitorder="little")
    np.testing.assert_array_equal(bits[: masks.size].astype(bool), masks.ravel())
    assert len(packer.content()) % 2 == 0


def test_a_video_shows_the_masks(blobs: Path, work: Path) -> None:
    clip = ultrasound(work / "us.dcm", frames()[:, :253, :255])
    done = call(
        "run", blobs, clip, "--track", "--box", BOX, "-o", "seg.dcm", "--overlay", "shown.mp4"
    )
    assert done.code == 0, done.err
    assert f"{COUNT} frames in" in done.out
    assert ", 0 lost" in done.out
    with av.open("shown.mp4") as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(25, rel=1e-3)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(pictures) == COUNT
    assert pictures[0].shape == (3 * 253 + 1, 3 * 255 + 1, 3)
    inside, outside = pictures[5][80 * 3, 95 * 3].astype(int), pictures[5][20, 20].astype(int)
    assert inside[2] > inside[0] + 10, "tinted by the first colour of the palette"
    assert np.ptp(outside) < 10


def test_the_overlay_alone_is_the_output(blobs: Path, work: Path) -> None:
    folder_of(work / "frames", frames(3))
    done = call("run", blobs, "frames", "--track", "--box", BOX, "-o", "overlay.mp4", "--json")
    assert done.code == 0, done.err
    assert (done.json["mask"], done.json["overlay"]) == (None, "overlay.mp4")
    assert sorted(path.name for path in work.iterdir()) == ["frames", "overlay.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frames", "--box", BOX, "--box", BOX], "2 boxes are as many structures"),
        (["frames"], "no prompt: give --point X,Y or --box"),
        (["frames", "--point", "5,5,5"], "expected X,Y or X,Y,LABEL"),
        (["frames", "--box", BOX, "-o", "seg.dcm"], "is not DICOM: name a folder or a .mp4"),
        (["frames", "--box", BOX, "-o", "masks.png"], "a folder, a .dcm or a .mp4"),
        (["frames", "--box", BOX, "-o", "frames"], "exists and is not an empty folder"),
        (["frames", "--box", BOX, "--overlay", "a.png"], "the overlay of a clip is a video"),
        (["frames", "--box", BOX, "-o", "a.mp4", "--overlay", "b.mp4"], "leave --overlay out"),
        (["frames", "--box", BOX, "-o", "no/seg.mp4"], "no is not a folder"),
        (["us.dcm", "--box", BOX, "-o", "us.dcm"], "us.dcm is part of the clip"),
        (["frames", "--box", BOX, "--propagate", "--margin", "3"], "--propagate, --margin cannot"),
        (["frames", "--box", BOX, "--nan", "background"], "--nan cannot be used with --track"),
        (["frames", "--box", BOX, "--class", "x"], "unknown class 'x'"),
        (["frame.png", "--box", BOX], "expected a clip: a video"),
        (["still.dcm", "--box", BOX], "has a single frame"),
        (["no.mp4", "--box", BOX], "no.mp4 does not exist"),
        (["list.mp4", "--box", BOX], "list.mp4 cannot be read as video"),
        (["short.mkv", "--box", "5,5,900,900"], "outside the"),
        (["--from-web", "http://x", "--study", "1.2", "--box", BOX], "leave --from-web"),
    ],
)
def test_what_cannot_be_tracked_is_refused_and_writes_nothing(
    blobs: Path, work: Path, arguments: list[str], message: str
) -> None:
    folder_of(work / "frames", frames(2))
    PIL.Image.fromarray(frames(1)[0]).save("frame.png")
    ultrasound(work / "us.dcm", frames(2))
    ultrasound(work / "still.dcm", frames(1))
    video(work / "short.mkv", frames(2))
    Path("list.mp4").write_text("ffconcat version 1.0\nfile short.mkv\n")
    before = contents(work)
    done = call("run", blobs, *arguments, "--track")
    assert done.code == 2
    assert message in done.error
    assert contents(work) == before


def test_a_class_needs_a_clip(bundle: Path, work: Path) -> None:
    done = call("run", bundle, "image.png", "--class", "liver", "--box", BOX)
    assert done.code == 2
    assert "--class is for clips" in done.error


def test_a_dicom_with_places_in_the_patient_is_a_volume(blobs: Path, work: Path) -> None:
    position = Dataset()
    position.ImagePositionPatient = [0, 0, 0]
    groups = Dataset()
    groups.PlanePositionSequence = [position]
    clip = ultrasound(work / "us.dcm", frames(2), PerFrameFunctionalGroupsSequence=[groups] * 2)
    done = call("run", blobs, clip, "--track", "--box", BOX, "-o", "seg.dcm")
    assert done.code == 2
    assert "have places in the patient: segment it as a volume" in done.error


def test_a_frame_of_another_size_ends_the_run_and_leaves_nothing(blobs: Path, work: Path) -> None:
    folder = folder_of(work / "frames", frames(2))
    PIL.Image.fromarray(np.eye(30, dtype=np.uint8)).save(folder / "frame99.png")
    before = contents(work)
    done = call(
        "run", blobs, folder, "--track", "--box", BOX, "-o", "out", "--overlay", "shown.mp4"
    )
    assert done.code == 2
    assert "30×30 pixels, expected 256×256" in done.error
    assert contents(work) == before


def test_frames_larger_than_the_limit_are_not_decoded(work: Path) -> None:
    path = video(work / "clip.mkv", frames(2))
    with (
        reading_within(Limits(memory=10**6)),
        pytest.raises(ImageError, match=r"take .* of memory"),
    ):
        open_clip(path)


def test_more_masks_than_the_limit_are_refused(work: Path) -> None:
    path = ultrasound(work / "us.dcm", frames(2))
    segment = segments(1, ["heart"], {})[0]
    with (
        reading_within(Limits(memory=10**4)),
        pytest.raises(ImageError, match=r"masks of 2 frames, which take 32.8 kB"),
    ):
        FrameSegmentation(work / "seg.dcm", path, segment, SegmentationDetails())


def test_a_clip_is_read_frame_by_frame(work: Path) -> None:
    clip = open_clip(video(work / "clip.mkv", frames(3)))
    assert (clip.kind, clip.rate) == ("video", 10)
    first = iter(clip)
    second = iter(clip)
    assert isinstance(first, Iterator)
    np.testing.assert_array_equal(next(first).image.pixels[..., 0], frames()[0])
    np.testing.assert_array_equal(next(second).image.pixels[..., 0], frames()[0])
    assert [frame.name for frame in first] == ["00001", "00002"]


def test_frame_times_of_a_vector_count(work: Path) -> None:
    clip = open_clip(ultrasound(work / "a.dcm", frames(3), FrameTimeVector=[0, 40, 60]))
    assert [frame.timestamp for frame in clip] == pytest.approx([0, 0.04, 0.1])
    assert clip.rate == pytest.approx(20)


def test_video_needs_its_extra(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(work / "clip.mkv", frames(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .medsa-deploy\[video\]"):
        open_clip(path)


def test_an_interrupt_leaves_nothing(bundle: Path, work: Path) -> None:
    folder_of(work / "frames", np.tile(frames(1), (300, 1, 1)))
    before = contents(work)
    process = begun(
        "run", bundle, "frames", "--track", "--box", BOX, "-o", "out", "--overlay", "shown.mp4"
    )
    while not list(work.glob(".medsa-*/frame1*.mask.png")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert_interrupted(ended(process, signal.SIGINT))
    assert contents(work) == before
