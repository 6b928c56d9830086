"""Bytes on the node's port → no more of them than may be kept.

A PDU that announces more than a sender may send ends its connection before it is read, and a silent
connection is closed. Of an object that is larger than the most, the rest is dropped as it comes. An
association whose object finds no room beside those of the others is aborted: senders try again.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from medsa_deploy.errors import MissingDependencyError

try:
    from pynetdicom import evt
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer
except ImportError as e:
    raise MissingDependencyError("pynetdicom", extra="node", purpose="the DICOM node") from e

MOST_PDU = 2**20
"""Bytes of one PDU; the node announces a quarter of it to senders."""
SILENCE_SECONDS = 60.0
COMMAND, LAST = 1, 2
"""Bits of a fragment's first byte: part of a command, else of an object; the last one."""
INVALID_PDU = "Evt19"
"""pynetdicom's event that aborts an association."""
MOST_COMMAND = 2**16
"""Bytes of a command; usual ones have a few hundred."""


class BoundedHandler(RequestHandler):  # type: ignore[misc]
    """Connections that cannot make the node read, or keep, without end."""

    def __init__(self, *arguments: Any, most_object: int, room: Room) -> None:
        self.most_object, self.room = most_object, room
        super().__init__(*arguments)

    def _create_association(self) -> Any:
        self.request.settimeout(SILENCE_SECONDS)
        association = super()._create_association()
        connection = association.dul.socket
        receive = connection.recv

        def bounded(count: int) -> Any:
            if count > MOST_PDU:
                raise OSError(f"a PDU of {count} bytes was announced")
            return receive(count)

        connection.recv = bounded
        messages = BoundedMessages(association, self.most_object, self.room)
        association.dimse.receive_primitive = messages
        association.bind(evt.EVT_CONN_CLOSE, _let_go, [self.request, messages])
        return association


class Room:
    """Memory for the objects that come at the same time, over all associations."""

    def __init__(self, most: int, on_full: Callable[[], None]) -> None:
        self._free, self._on_full = most, on_full
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Whether there is room for so many bytes more; they are taken then."""
        with self._lock:
            enough = count <= self._free
            self._free -= count if enough else 0
        if not enough:
            self._on_full()
        return enough

    def give_back(self, count: int) -> None:
        """Bytes that are no longer kept."""
        with self._lock:
            self._free += count


class BoundedMessages:
    """Fragments of messages on their way to pynetdicom, which keeps all that it gets.

    Of an object, one byte more than the most is kept, by which it is known to be too large.
    """

    def __init__(self, association: Any, most_object: int, room: Room) -> None:
        self._receive = association.dimse.receive_primitive
        self._association, self._most_object, self._room = association, most_object, room
        self._command = self._object = 0
        """Bytes of the present message."""
        self._held_bytes = 0
        """Of objects that pynetdicom has."""
        self._lock = threading.Lock()

    def __call__(self, primitive: Any) -> None:
        primitive.presentation_data_value_list = [
            [context, self._trimmed(bytes(fragment))]
            for context, fragment in primitive.presentation_data_value_list
        ]
        fragments = [fragment for _, fragment in primitive.presentation_data_value_list]
        size = sum(len(fragment) - 1 for fragment in fragments if not fragment[0] & COMMAND)
        if self._command > MOST_COMMAND or not self._room.take(size):
            self._association.dul.event_queue.put(INVALID_PDU)
            return
        with self._lock:
            self._held_bytes += size
        self._receive(primitive)

    def let_go(self, count: int | None = None) -> None:
        """So many bytes of an object are no longer kept; None: nothing is."""
        with self._lock:  # the connection may be closed while an object is stored
            count = self._held_bytes if count is None else min(count, self._held_bytes)
            self._held_bytes -= count
        self._room.give_back(count)

    def _trimmed(self, fragment: bytes) -> bytes:
        """A fragment, or the part of it that is kept; its first byte says what it is."""
        kind, size = fragment[0] & 3, len(fragment) - 1
        if kind & COMMAND:
            self._command += size
            if kind & LAST:
                self._object = 0
        else:
            self._command = 0
            room = max(0, self._most_object + 1 - self._object)
            self._object = 0 if kind & LAST else self._object + size
            if size > room:
                return fragment[: 1 + room]
        return fragment


def _let_go(event: Any, request: socket.socket, messages: BoundedMessages) -> None:
    """Free a closed connection's socket and objects, and its association if none was requested."""
    request.close()
    messages.let_go()
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


class BoundedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """A server that greets in each connection's own thread, so that a silent one stops no other."""

    request_queue_size = 32

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the handshake of TLS waits for the first byte that is read."""
        connection, address = self.socket.accept()
        connection.settimeout(SILENCE_SECONDS)
        if self.ssl_context:
            connection = self.ssl_context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address
