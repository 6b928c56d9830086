"""The node's port: objects that are too large, headers that announce too much."""

from __future__ import annotations

import gc
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dicom_network import SOCKETS_LEFT, ct_series, send
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medsa_deploy.dicom_node.bounded_port import MOST_COMMAND, BoundedMessages, Room
from medsa_deploy.dicom_node.health import node_metrics
from medsa_deploy.dicom_node.received import received_object
from medsa_deploy.dicom_node.receiver import (
    OUT_OF_RESOURCES,
    SUCCESS,
    Receiver,
)
from medsa_deploy.dicom_node.spool import Inbox, Spool
from medsa_deploy.errors import ImageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.images.limits import Limits, reading_within
from medsa_deploy.metrics import Metrics

pytestmark = SOCKETS_LEFT
MOST = 60_000


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Sockets are collected in the test that left them."""
    yield
    gc.collect()


def large(dataset: Dataset) -> Dataset:
    dataset.Rows = 2 * dataset.Rows
    dataset.PixelData = 2 * dataset.PixelData
    return dataset


@contextmanager
def receiving(folder: Path, **options: int) -> Iterator[tuple[Receiver, io.StringIO, Metrics]]:
    """A receiver that answers, its log and its metrics."""
    log, metrics = io.StringIO(), node_metrics()
    inbox = Inbox(Spool(folder), most_series=9)
    events = EventLog(log, identifiers=True)
    receiver = Receiver(inbox, events, metrics, aet="MEDSA", address=("127.0.0.1", 0), **options)
    thread = threading.Thread(target=receiver.serve)
    thread.start()
    try:
        yield receiver, log, metrics
    finally:
        receiver.close(serving=True)
        thread.join()
        inbox.close()


def test_an_object_that_is_too_large_is_refused_and_others_are_taken(tmp_path: Path) -> None:
    limits = {"most_object": MOST, "most_at_once": MOST // 2}  # one finds room even so
    with receiving(tmp_path, **limits) as (receiver, log, metrics):
        first, second, third = ct_series(3)
        statuses = send(receiver.port, [first, large(second), third])
    assert statuses == [SUCCESS, OUT_OF_RESOURCES, SUCCESS]
    assert len(list(tmp_path.glob("receiving/*/images/*.dcm"))) == 2
    (event,) = [json.loads(line) for line in log.getvalue().splitlines() if "refused" in line]
    assert (event["reason"], event["status"]) == ("too large", "0xA700")
    assert "60 kB: raise --max-object" in json.dumps(event)
    assert 'medsa_images_refused_total{reason="too large"} 1' in metrics.text()


class Association:
    """As much of pynetdicom's as messages need; it records what they pass on."""

    def __init__(self) -> None:
        self.passed: list[tuple[int, bytes]] = []
        self.faults: list[str] = []
        self.dimse = SimpleNamespace(receive_primitive=self._receive)
        self.dul = SimpleNamespace(event_queue=SimpleNamespace(put=self.faults.append))

    def _receive(self, primitive: Any) -> None:
        for _, fragment in primitive.presentation_data_value_list:
            self.passed.append((fragment[0], fragment[1:]))


def fragments(*values: tuple[int, int]) -> Any:
    """Fragments of these kinds and sizes."""
    parts = [[1, bytes([kind]) + bytes(size)] for kind, size in values]
    return SimpleNamespace(presentation_data_value_list=parts)


def test_no_more_of_an_object_is_kept_than_shows_that_it_is_too_large() -> None:
    association = Association()
    messages = BoundedMessages(association, 100, Room(10**6, lambda: None))
    for _ in range(2):
        association.passed.clear()
        messages(fragments((3, 50), (0, 60)))
        for _ in range(9):
            messages(fragments((0, 60)))
        messages(fragments((2, 60)))
        assert sum(len(content) for kind, content in association.passed if kind != 3) == 101
        assert association.passed[-1] == (2, b"")
    association.passed.clear()
    messages(fragments((3, 50), (2, 100)))
    assert association.passed == [(3, bytes(50)), (2, bytes(100))]


def test_a_command_without_end_is_aborted() -> None:
    association = Association()
    messages = BoundedMessages(association, 100, Room(10**6, lambda: None))
    for _ in range(3):
        messages(fragments((1, MOST_COMMAND // 2)))
    assert association.faults == ["Evt19"]
    assert len(association.passed) == 2


def test_objects_that_come_at_the_same_time_share_their_room() -> None:
    full: list[str] = []
    room = Room(250, lambda: full.append("full"))
    first, second, third = Association(), Association(), Association()
    messages = [BoundedMessages(each, 200, room) for each in (first, second, third)]
    for each in messages[:2]:
        each(fragments((3, 50), (0, 100)))
    messages[2](fragments((3, 50), (0, 60)))
    assert (full, third.faults, third.passed) == (["full"], ["Evt19"], [])
    messages[0](fragments((2, 50)))
    assert first.passed[-1] == (2, bytes(50))
    messages[0].let_go(150)  # it was stored
    messages[1].let_go()  # its connection was closed
    for _ in range(2):
        messages[2](fragments((3, 50), (2, 200)))
        messages[2].let_go(200)
    assert (len(full), len(third.passed)) == (1, 4)


def test_room_is_given_back_after_each_object(tmp_path: Path) -> None:
    series = ct_series(4)
    size = len(encoded(series[0]))
    limits = {"most_object": size, "most_at_once": size + size // 2}
    with receiving(tmp_path, **limits) as (receiver, _, metrics):
        assert send(receiver.port, series) == 4 * [SUCCESS]
        assert send(receiver.port, series[1:2]) == [SUCCESS]
    assert "too much at once" not in metrics.text()


def encoded(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_many_items_in_a_header_are_refused() -> None:
    content = encoded(ct_series(1)[0])
    item = b"\xfe\xff\x00\xe0\x00\x00\x00\x00"
    sequence = b"\x09\x00\x01\x10SQ\0\0\xff\xff\xff\xff" + 30_000 * item
    place = content.index(b"\x28\x00\x02\x00US")
    content = content[:place] + sequence + b"\xfe\xff\xdd\xe0\0\0\0\0" + content[place:]
    with reading_within(Limits(items=20_000)):
        with pytest.raises(ImageError, match=r"the object announces 3000\d items of sequences"):
            received_object(content, "A")
    assert received_object(content, "A").modality == "CT"


def test_a_deflated_object_is_judged_before_it_is_inflated() -> None:
    dataset = ct_series(1)[0]
    dataset.Rows = dataset.Columns = 2000
    dataset.PixelData = np.zeros(2000 * 2000, np.uint16).tobytes()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    content = encoded(dataset)
    with reading_within(Limits(decompressed=10**6)):
        with pytest.raises(ImageError, match=r"the object inflates from .* as no image does"):
            received_object(content, "A")


def test_a_damaged_uid_is_not_repeated() -> None:
    dataset = ct_series(1)[0]
    content = encoded(dataset)
    uid = dataset.SeriesInstanceUID.encode()
    content = content.replace(uid, b"DOE^JANE".ljust(len(uid), b"X"))
    with pytest.raises(ImageError, match="the object has no valid SeriesInstanceUID") as caught:
        received_object(content, "A")
    assert "DOE" not in str(caught.value)
