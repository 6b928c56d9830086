"""Cases with Orthanc and with a full disk, for a network and mounts of their own.

Orthanc listens on all addresses and a full disk needs a mount, so `test_dicom_orthanc.py` runs this
file with pytest inside `unshare`. Its name keeps it out of the usual collection.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from command_line import call
from dicom_network import (
    SOCKETS_LEFT,
    WHOLE_TEMPLATE,
    FakePacs,
    ct_series,
    free_port,
    listens,
    running_node,
    send,
    wait_until,
    write_rules,
)
from dicom_tools import check_iod, program
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset

from medsa_deploy.errors import ImageError
from medsa_deploy.stages.run.dicomweb import WebSeries, store_files

pytestmark = SOCKETS_LEFT
BUNDLE = Path(os.environ["MEDSA_CASES_BUNDLE"])
PLUGINS = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


@dataclass
class Orthanc:
    """A running Orthanc."""

    folder: Path
    http: int
    dicom: int

    @property
    def web(self) -> str:
        """The address of its DICOMweb service."""
        return f"http://127.0.0.1:{self.http}/dicom-web"

    @property
    def target(self) -> str:
        """As --send has it."""
        return f"127.0.0.1:{self.dicom}:ORTHANC"

    def ask(self, path: str, body: Any = None) -> Any:
        """An answer of its REST interface."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def instances(self, study: str, modality: str) -> list[Dataset]:
        """The objects of a modality in a study, found by QIDO and read by WADO."""
        client = DICOMwebClient(self.web)
        answers = client.search_for_series(study, search_filters={"Modality": modality})
        return [
            dataset
            for series in answers
            for dataset in client.retrieve_series(study, series["0020000E"]["Value"][0])
        ]

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "orthanc.log").open("ab") as log:
            process = subprocess.Popen(
                [program("Orthanc"), self.folder / "orthanc.json"], stdout=log, stderr=log
            )
        wait_until(lambda: listens(self.http) and listens(self.dicom))
        return process


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc"), AuthenticationEnabled=False) as server:
        yield server


@contextmanager
def running_orthanc(folder: Path, **settings: Any) -> Iterator[Orthanc]:
    """Orthanc with its DICOMweb plugin."""
    server = Orthanc(folder, free_port(), free_port())
    configuration = {
        "Name": "ORTHANC",
        "StorageDirectory": str(server.folder / "db"),
        "IndexDirectory": str(server.folder / "db"),
        "HttpPort": server.http,
        "DicomPort": server.dicom,
        "DicomAet": "ORTHANC",
        "DicomAlwaysAllowStore": True,
        "Plugins": [PLUGINS],
        "DicomWeb": {"Enable": True},
        **settings,
    }
    (server.folder / "orthanc.json").write_text(json.dumps(configuration))
    process = server.start()
    try:
        yield server
    finally:
        process.kill()
        process.wait()


def stored(orthanc: Orthanc, series: list[Dataset]) -> str:
    """Put a series into Orthanc by STOW; returns its study."""
    DICOMwebClient(orthanc.web).store_instances(series)
    return str(series[0].StudyInstanceUID)


def checked(datasets: list[Dataset], folder: Path) -> None:
    """Each of them is what the standard demands."""
    for k, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{k}.dcm", implicit_vr=False, little_endian=True)
        check_iod(folder / f"{k}.dcm")


def test_from_orthanc_to_the_node_and_back(orthanc: Orthanc, tmp_path: Path) -> None:
    """Orthanc sends CT and MR by C-STORE; the node stores SEG and SR by C-STORE and by STOW."""
    rules = write_rules(tmp_path, {**WHOLE_TEMPLATE, "measurements": True})
    for options in ({"send": (orthanc.target,)}, {"to_web": orthanc.web}):
        with running_node(tmp_path, BUNDLE, None, rules=rules, **options) as node:
            for name in ("CT_small.dcm", "MR_small.dcm"):
                study = stored(orthanc, ct_series(3, name=name))
                modality = [["MEDSA", "127.0.0.1", node.port]][0]
                request = urllib.request.Request(
                    f"http://127.0.0.1:{orthanc.http}/modalities/node",
                    json.dumps(modality).encode(),
                    method="PUT",
                )
                urllib.request.urlopen(request, timeout=10).close()
                (instance,) = orthanc.ask(
                    "/tools/find", {"Level": "Study", "Query": {"StudyInstanceUID": study}}
                )
                begun = time.monotonic()
                orthanc.ask("/modalities/node/store", [instance])
                wait_until(lambda study=study: orthanc.instances(study, "SR"))
                print(f"{name}: {time.monotonic() - begun:.2f} s")
                (segmentation,) = orthanc.instances(study, "SEG")
                (report,) = orthanc.instances(study, "SR")
                checked([segmentation, report], tmp_path)
                assert report.StudyInstanceUID == study
                assert len(segmentation.ReferencedSeriesSequence) == 1
                wait_until(node.idle)


def test_a_study_is_fetched_segmented_and_stored_by_dicomweb(
    orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    series = ct_series(3)
    study = stored(orthanc, series)
    web = ["--from-web", orthanc.web, "--study", study]
    prompts = ["--box", "10,10,0,90,90,3", "--to-web", orthanc.web, "--measurements", "sr.dcm"]
    done = call("run", BUNDLE, *web, *prompts, "--json")
    assert done.code == 0, done.err
    assert done.json["mask"] == "seg.dcm"
    (segmentation,) = orthanc.instances(study, "SEG")
    (report,) = orthanc.instances(study, "SR")
    checked([segmentation, report], tmp_path)
    assert segmentation.SOPInstanceUID == pydicom.dcmread("seg.dcm").SOPInstanceUID
    arguments = [
        "--series",
        str(series[0].SeriesInstanceUID),
        "--box",
        "10,10,0,90,90,1",
        "-o",
        "b.dcm",
    ]
    done = call("run", BUNDLE, *web, *arguments, "--json")
    assert done.code == 0, done.err


def test_the_node_fetches_a_study_when_it_starts(orthanc: Orthanc, tmp_path: Path) -> None:
    study = stored(orthanc, ct_series(2))
    source = WebSeries(url=orthanc.web, study=study)
    with running_node(tmp_path, BUNDLE, None, to_web=orthanc.web, from_web=source):
        wait_until(lambda: orthanc.instances(study, "SEG"))


def test_passwords_are_read_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.dcm"
    ct_series(1)[0].save_as(path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    users = {"AuthenticationEnabled": True, "RegisteredUsers": {"scanner": "secret"}}
    with running_orthanc(tmp_path, **users) as server:
        with pytest.raises(ImageError, match="401"):
            store_files(server.web, [path])
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login scanner password secret\n")
        store_files(server.web, [path])
        study = str(pydicom.dcmread(path).StudyInstanceUID)
        assert len(WebSeries(url=server.web, study=study).fetch(tmp_path)) == 1


def test_servers_that_do_not_answer_are_named(orthanc: Orthanc, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/dicom-web"
    with pytest.raises(ImageError, match=r"study 1\.2\.3 cannot be fetched"):
        WebSeries(url=nowhere, study="1.2.3").fetch(tmp_path)
    with pytest.raises(ImageError, match=r"study 1\.2\.3 cannot be fetched"):
        WebSeries(url=orthanc.web, study="1.2.3").fetch(tmp_path)
    source = WebSeries(url=nowhere, study="1.2.3")
    with (
        pytest.raises(ImageError, match="cannot be fetched"),
        running_node(tmp_path, BUNDLE, None, to_web=nowhere, from_web=source),
    ):
        pass
    path = tmp_path / "a.dcm"
    ct_series(1)[0].save_as(path)
    with pytest.raises(ImageError, match=r"a\.dcm cannot be stored"):
        store_files(nowhere, [path])
    with pytest.raises(ImageError, match="no address of a DICOMweb service"):
        store_files("nonsense", [path])


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    """A disk of 4 MB: images are refused while it is full, and nothing that was taken is lost."""
    disk = tmp_path / "spool"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        pacs = FakePacs()
        with running_node(tmp_path, BUNDLE, pacs, quiet_time=1.0) as node:
            filler = disk / "filler"
            series = ct_series(4)
            assert send(node.port, series[:1]) == [0]
            with filler.open("wb", buffering=0) as f:
                try:
                    while True:
                        f.write(bytes(4096))
                except OSError:
                    pass
            assert set(send(node.port, series[1:])) == {0xA700}
            refused = 'medsa_images_refused_total{reason="disk full"} 3'
            assert refused in node.get("/metrics")
            wait_until(lambda: [e for e in node.named("segmented") if e["result"] == "postponed"])
            assert not pacs.stored
            filler.unlink()
            wait_until(lambda: pacs.stored)
            wait_until(node.idle)
            assert send(node.port, series) == [0] * 4
            wait_until(lambda: len(pacs.stored) == 2)
        pacs.close()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_orthanc_down_for_a_minute(orthanc: Orthanc, tmp_path: Path) -> None:
    server = Orthanc(tmp_path, free_port(), free_port())
    text = (orthanc.folder / "orthanc.json").read_text()
    for old, new in ((orthanc.http, server.http), (orthanc.dicom, server.dicom)):
        text = text.replace(str(old), str(new))
    (tmp_path / "orthanc.json").write_text(text.replace(str(orthanc.folder), str(tmp_path)))
    series = ct_series(3)
    with running_node(tmp_path, BUNDLE, None, send=(server.target,)) as node:
        assert set(send(node.port, series)) == {0}
        wait_until(lambda: node.named("not sent"))
        time.sleep(60)
        process = server.start()
        wait_until(lambda: server.instances(str(series[0].StudyInstanceUID), "SEG"), 120)
        wait_until(node.idle)
        assert len(server.instances(str(series[0].StudyInstanceUID), "SEG")) == 1
        process.kill()
        process.wait()
