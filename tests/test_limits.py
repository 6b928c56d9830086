"""Files that announce more than there may be are refused from their headers; decoders may fail."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from time import process_time

import nibabel
import numpy as np
import pytest
from command_line import call
from dicom_images import RAMP, dicom
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images import is_volume, read_image, read_volume
from medsa_deploy.images.decoder import decoder
from medsa_deploy.images.limits import VARIABLE, Limits, parse_size, reading_within

PATIENT = "QZX^MARKED"


def refused(path: Path, text: str) -> str:
    """The message of a refusal in less than a second of processor time."""
    start = process_time()
    with pytest.raises(ImageError, match=text) as caught:
        read_image(path)
    assert process_time() - start < 1
    return str(caught.value)


def compressed(folder: Path, syntax: str, **attributes: int) -> Path:
    dataset = dicom(RAMP)
    dataset.PatientName = PATIENT
    dataset.compress(syntax, generate_instance_uid=False)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(folder / "a.dcm", enforce_file_format=True)
    return folder / "a.dcm"


def png(folder: Path, columns: int, rows: int) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">L", zlib.crc32(kind + content))
        return struct.pack(">L", len(content)) + kind + content + check

    header = struct.pack(">LLBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9)))]
    path = folder / "a.png"
    path.write_bytes(b"".join([*parts, chunk(b"IEND", b"")]))
    return path


def test_a_picture_that_its_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    refused(png(tmp_path, 48, 2_752_552), "announces 48×2752552 pixels.*cannot hold them")


def test_a_large_picture_is_refused_with_advice(tmp_path: Path) -> None:
    refused(png(tmp_path, 40_000, 40_000), "1600 million pixels, more than.*crop it or scale it")


def test_a_slice_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[40:48] = struct.pack("<q", 2**31)  # dim[3]
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ImageError, match="more than the file can hold"):
        read_image(tmp_path / "a.nii", axis=2, index=0)


def test_a_budget_decides_and_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = np.arange(64**3, dtype=np.int16).reshape(64, 64, 64)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setenv(VARIABLE, "500kB")
    with pytest.raises(
        ImageError, match=r"64×64×64 voxels of int16.*limit is 500 kB.*--max-memory"
    ):
        read_volume(tmp_path / "a.nii.gz")
    with reading_within(Limits(memory=10**7)):
        assert read_volume(tmp_path / "a.nii.gz").shape == (64, 64, 64)
    monkeypatch.setenv(VARIABLE, "10 MB")
    assert read_volume(tmp_path / "a.nii.gz").shape == (64, 64, 64)


def test_content_that_inflates_as_no_image_does_is_refused(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((1000, 1000, 100))
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    content = header.binaryblock + bytes(4 + 10**8)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, 9))
    with reading_within(Limits(decompressed=10**7)):
        with pytest.raises(ImageError, match=r"inflates from .* to 100 MB, as no image does"):
            read_volume(tmp_path / "a.nii.gz")


def test_a_deflated_dicom_is_judged_before_it_is_inflated(tmp_path: Path) -> None:
    dataset = dicom(np.zeros((2000, 2000), np.uint16))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with reading_within(Limits(decompressed=10**6)):
        assert not is_volume(tmp_path / "a.dcm")
        refused(tmp_path / "a.dcm", "inflates from .* as no image does")


def test_many_items_are_counted_before_they_are_parsed(tmp_path: Path) -> None:
    dicom(RAMP).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    content = (tmp_path / "a.dcm").read_bytes()
    pixels = content.index(b"\xe0\x7f\x10\x00OW")
    item = b"\xfe\xff\x00\xe0\x00\x00\x00\x00"
    sequence = b"\x09\x00\x01\x10SQ\0\0\xff\xff\xff\xff" + 300_000 * item
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    place = content.index(b"\x28\x00\x02\x00US")
    (tmp_path / "a.dcm").write_bytes(content[:place] + sequence + end + content[place:])
    assert pixels > place
    with reading_within(Limits(items=250_000)):
        refused(tmp_path / "a.dcm", "announces 300000 items of sequences; the limit is 250000")


@pytest.mark.parametrize("size", [60_000, 30_000])
def test_a_huge_rle_canvas_never_reaches_its_decoder(tmp_path: Path, size: int) -> None:
    path = compressed(tmp_path, RLELossless, Rows=size, Columns=size)
    refused(path, f"announces {size}×{size} pixels")


def test_a_panic_of_a_decoder_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = compressed(tmp_path, RLELossless)
    good = read_image(path).pixels
    dataset = dicom(RAMP)
    dataset.compress(RLELossless, generate_instance_uid=False)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[:128] + b"\xf0\x00" + frame[128:]])  # 17 too many
    dataset.save_as(path, enforce_file_format=True)
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(path)
    assert (read_image(compressed(tmp_path, RLELossless)).pixels == good).all()


def test_a_decoder_that_is_killed_costs_one_frame(tmp_path: Path) -> None:
    path = compressed(tmp_path, JPEG2000Lossless)
    good = read_image(path).pixels
    assert (good == RAMP).all()
    process = decoder._process
    assert process is not None
    os.kill(process.pid, 19)  # it stops, as one that hangs
    with reading_within(Limits(seconds=0.3)), pytest.raises(ImageError, match=r"within 0.3 s"):
        read_image(path)
    assert (read_image(path).pixels == good).all()
    process = decoder._process
    assert process is not None
    process.kill()
    process.wait()
    assert (read_image(path).pixels == good).all()


def test_decoding_needs_nothing_that_windows_lacks(tmp_path: Path) -> None:
    path = compressed(tmp_path, JPEG2000Lossless)
    for name in ("fcntl", "resource"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    code = (
        "import os, select, signal, sys\n"
        "for module, name in ((select, 'poll'), (os, 'readv'), (os, 'set_blocking'),\n"
        "                     (signal, 'setitimer')): delattr(module, name)\n"
        "import medsa_deploy.images.decoder as decoder\n"
        "from medsa_deploy.images import read_image\n"
        "assert decoder.fcntl is None\n"
        "print(read_image(sys.argv[1]).pixels.sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == (str(RAMP.sum()), 0), done.stderr


def test_threads_share_the_decoder(tmp_path: Path) -> None:
    path = compressed(tmp_path, JPEG2000Lossless)
    results: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(bool((read_image(path).pixels == RAMP).all()))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize(
    "name", ["SOPClassUID", "PhotometricInterpretation", "RescaleSlope", "WindowCenter", "Rows"]
)
def test_a_damaged_value_is_never_repeated(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dicom(RAMP, RescaleSlope=2, WindowCenter=5, WindowWidth=9)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    content = (tmp_path / "a.dcm").read_bytes()
    element = dataset[name]
    place = content.rindex(struct.pack("<HH", element.tag.group, element.tag.element)) + 6
    size = struct.unpack_from("<H", content, place)[0]
    mark = (PATIENT.encode() + bytes(size))[:size] if size >= 6 else b"QZ"[:size]
    (tmp_path / "a.dcm").write_bytes(content[: place + 2] + mark + content[place + 2 + size :])
    caplog.set_level("DEBUG", "medsa_deploy")
    messages = []
    for function in (read_image, read_volume):
        try:
            function(tmp_path / "a.dcm")
        except ImageError as e:
            messages.append(str(e))
    assert "QZ" not in " ".join([*messages, *(record.getMessage() for record in caplog.records)])


@pytest.mark.parametrize(
    ("text", "size"),
    [("500", 500), ("2 kB", 2000), ("1.5GB", 1_500_000_000), ("4g", 4 * 10**9), ("2GiB", 2**31),
     ("64 kib", 2**16), ("1MiB", 2**20), ("1T", 10**12)],
)  # fmt: skip
def test_a_size_means_the_same_in_every_option(text: str, size: int) -> None:
    assert parse_size(text, "--cache") == size
    assert str(Limits.of_memory(parse_size(text, VARIABLE)).memory) == str(size)


def test_the_servers_sizes_are_those_of_other_options(tmp_path: Path) -> None:
    from medsa_deploy.cli.dicom_node import NodeCommandOptions
    from medsa_deploy.cli.serve import ServeCommandOptions

    options = ServeCommandOptions(cache="1GiB", image_memory="3GB", max_upload="5MB")
    server = options.server([tmp_path])
    sizes = (server.cache_bytes, server.image_bytes, server.upload_bytes)
    assert sizes == (2**30, 3 * 10**9, 5 * 10**6)
    node = NodeCommandOptions(rules=tmp_path, max_object="7MB").node(tmp_path)
    assert node.max_object == 7 * 10**6


@pytest.mark.parametrize(
    "command",
    ["run a.medsa a.png", "verify a.medsa", "quantize a.medsa", "profile a.medsa", "serve a.medsa",
     "export a.pth", "build-engine a.medsa", "dicom-node a.medsa --rules r.json"],
)  # fmt: skip
def test_every_command_that_reads_images_has_the_option(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1GB")
    done = call(*command.split(), "--max-memory", "much")
    assert done.code == 2
    assert "--max-memory 'much' is no size" in done.error
    assert call(*command.split(), "--max-memory", "3MB").code == 2  # a.medsa does not exist
    assert os.environ[VARIABLE] == "3MB"


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "iB", "1GiBB", "nan"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-memory.*is no size"):
        parse_size(text, "--max-memory")
