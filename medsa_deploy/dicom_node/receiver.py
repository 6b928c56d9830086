"""Associations → objects in the spool: the C-ECHO and C-STORE service of the node.

Bytes on the port are bounded: a PDU that announces more than a sender may send ends its connection
before it is read, a silent connection is closed, and so is one beyond the most at a time. Of an
object that is larger than the most, the rest is dropped as it comes, and the object refused.
"""

from __future__ import annotations

import errno
import functools
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError, MissingDependencyError, UsageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.images.limits import size_text
from medsa_deploy.metrics import Metrics

from .received import received_object
from .spool import Inbox, QueueFullError
from .study_prompts import PROMPT_CLASSES

try:
    from pydicom.pixels import get_decoder
    from pydicom.uid import (
        UID,
        AllTransferSyntaxes,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
    )
    from pynetdicom import AE, build_context, evt, sop_class
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer
except ImportError as e:
    raise MissingDependencyError("pynetdicom", extra="node", purpose="the DICOM node") from e

SUCCESS, OUT_OF_RESOURCES = 0x0000, 0xA700
DATASET_MISMATCH, NOT_UNDERSTOOD = 0xA900, 0xC000
UNCOMPRESSED = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)  # fmt: skip
IMAGE_CLASSES = (
    "CTImageStorage", "EnhancedCTImageStorage", "LegacyConvertedEnhancedCTImageStorage",
    "MRImageStorage", "EnhancedMRImageStorage", "EnhancedMRColorImageStorage",
    "LegacyConvertedEnhancedMRImageStorage", "PositronEmissionTomographyImageStorage",
    "EnhancedPETImageStorage", "LegacyConvertedEnhancedPETImageStorage",
    "NuclearMedicineImageStorage", "UltrasoundImageStorage", "UltrasoundMultiFrameImageStorage",
    "EnhancedUSVolumeStorage", "ComputedRadiographyImageStorage",
    "DigitalXRayImageStorageForPresentation", "DigitalMammographyXRayImageStorageForPresentation",
    "BreastTomosynthesisImageStorage", "XRayAngiographicImageStorage",
    "XRayRadiofluoroscopicImageStorage", "EnhancedXAImageStorage", "EnhancedXRFImageStorage",
    "XRay3DAngiographicImageStorage", "XRay3DCraniofacialImageStorage", "RTImageStorage",
    "SecondaryCaptureImageStorage", "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
    "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
    "MultiFrameTrueColorSecondaryCaptureImageStorage", "VLEndoscopicImageStorage",
    "VLMicroscopicImageStorage", "VLPhotographicImageStorage", "VideoEndoscopicImageStorage",
    "OphthalmicPhotography8BitImageStorage", "OphthalmicPhotography16BitImageStorage",
    "OphthalmicTomographyImageStorage",
    "IntravascularOpticalCoherenceTomographyImageStorageForPresentation",
)  # fmt: skip
"""Storage classes of images, by pynetdicom's names."""
MOST_PDU = 2**20
"""Bytes of one PDU; the node announces a quarter of it to senders."""
SILENCE_SECONDS = 60.0
REQUEST_SECONDS = 15.0
"""Time from a connection to the request of its association."""
MOST_ASSOCIATIONS = 20
COMMAND, LAST = 1, 2
"""Bits of a fragment's first byte: part of a command, else of an object; the last one."""
INVALID_PDU = "Evt19"
"""pynetdicom's event that aborts an association."""
MOST_COMMAND = 2**16
"""Bytes of a command; usual ones have a few hundred."""
MOST_OBJECT = 2 * 10**9
"""Bytes of an object, without an option."""


class Receiver:
    """Listens until `close`."""

    def __init__(
        self,
        inbox: Inbox,
        events: EventLog,
        metrics: Metrics,
        *,
        aet: str,
        address: tuple[str, int],
        allowed: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        most_object: int = MOST_OBJECT,
    ) -> None:
        """`allowed`: AE titles that may send; none for all. `most_object`: bytes of an object.

        OSError if the port is taken.
        """
        self.inbox, self.events, self.metrics = inbox, events, metrics
        self.most_object = most_object
        self._ae = AE(ae_title=aet)
        self._ae.maximum_associations = MOST_ASSOCIATIONS
        self._ae.maximum_pdu_size = MOST_PDU // 4
        self._ae.network_timeout = self._ae.dimse_timeout = SILENCE_SECONDS
        self._ae.acse_timeout = REQUEST_SECONDS
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = list(allowed)
        handlers = [
            (evt.EVT_REQUESTED, _support_requested, [supported_syntaxes()]),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_ABORTED, self._aborted),
        ]
        self._server = self._ae.make_server(
            address,
            evt_handlers=handlers,
            contexts=[build_context(sop_class.Verification)],  # copied for every connection
            server_class=_BoundedServer,
            ssl_context=tls,
            request_handler=functools.partial(_BoundedHandler, most_object=most_object),
        )
        self._ae._servers.append(self._server)
        self.port: int = self._server.server_address[1]

    def serve(self) -> None:
        """Answer until `close`; for a thread of its own."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self, *, serving: bool) -> None:
        """Stop listening, and end associations. `serving`: whether a thread is in `serve`."""
        if serving:
            self._server.shutdown()
        else:
            self._server.server_close()
        for association in list(self._server.active_associations):
            association.abort()

    def _store(self, event: Any) -> int:
        """Put one object into the spool; returns the status of the C-STORE."""
        calling = str(event.assoc.requestor.ae_title).strip()
        if event.request.DataSet.getbuffer().nbytes > self.most_object:
            text = f"an object has more than {size_text(self.most_object)}: raise --max-object"
            return self._refuse("too large", OUT_OF_RESOURCES, calling, text)
        try:
            content = event.encoded_dataset()
            item = received_object(content, calling)
            request = event.request
            if (item.sop_class, item.instance) != (
                str(request.AffectedSOPClassUID),
                str(request.AffectedSOPInstanceUID),
            ):
                return self._refuse("mismatch", DATASET_MISMATCH, calling)
            self.inbox.store(item, content)
        except QueueFullError:
            return self._refuse("queue full", OUT_OF_RESOURCES, calling)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._refuse("disk full" if full else "disk", OUT_OF_RESOURCES, calling)
        except MemoryError:
            return self._refuse("memory", OUT_OF_RESOURCES, calling)
        except ImageError as e:
            return self._refuse("not understood", NOT_UNDERSTOOD, calling, str(e))
        self.metrics.count("medsa_images_received_total")
        return SUCCESS

    def _refuse(self, reason: str, status: int, calling: str, text: str = "") -> int:
        self.metrics.count("medsa_images_refused_total", reason=reason)
        self.events.write(
            "refused", {"text": text}, reason=reason, status=f"0x{status:04X}", calling_aet=calling
        )
        return status

    def _rejected(self, event: Any) -> None:
        """An association that does not fit: titles, or no storage class that is taken."""
        self.metrics.count("medsa_images_refused_total", reason="association")
        calling = str(event.assoc.requestor.ae_title).strip()
        self.events.write("rejected", calling_aet=calling)

    def _aborted(self, event: Any) -> None:
        self.events.write("aborted", calling_aet=str(event.assoc.requestor.ae_title).strip())


def _support_requested(event: Any, supported: Mapping[str, Sequence[str]]) -> None:
    """Support the storage classes of a request: a copy of all of them costs 7 ms a connection.

    The transfer syntax that a sender names first is accepted: it may be unable to convert images.
    """
    offered: dict[str, list[str]] = {}
    for context in event.assoc.requestor.requested_contexts:
        offered.setdefault(str(context.abstract_syntax), []).extend(context.transfer_syntax)
    event.assoc.acceptor.supported_contexts = [
        build_context(uid, _as_offered(supported[uid], syntaxes))
        for uid, syntaxes in offered.items()
        if uid in supported
    ]


def _as_offered(supported: Sequence[str], offered: Sequence[str]) -> list[str]:
    """Supported transfer syntaxes, those that are offered first and in their order."""
    return list(dict.fromkeys([*(uid for uid in offered if uid in supported), *supported]))


class _BoundedHandler(RequestHandler):  # type: ignore[misc]
    """Connections that cannot make the node read, or keep, without end."""

    def __init__(self, *arguments: Any, most_object: int) -> None:
        self.most_object = most_object
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
        association.dimse.receive_primitive = _BoundedMessages(association, self.most_object)
        association.bind(evt.EVT_CONN_CLOSE, _let_go, [self.request])
        return association


class _BoundedMessages:
    """Fragments of messages on their way to pynetdicom, which keeps all that it gets.

    Of an object, one byte more than the most is kept, by which it is known to be too large.
    """

    def __init__(self, association: Any, most_object: int) -> None:
        self._receive = association.dimse.receive_primitive
        self._association, self._most_object = association, most_object
        self._command = self._object = 0
        """Bytes of the present message."""

    def __call__(self, primitive: Any) -> None:
        primitive.presentation_data_value_list = [
            [context, self._trimmed(bytes(fragment))]
            for context, fragment in primitive.presentation_data_value_list
        ]
        if self._command > MOST_COMMAND:
            self._association.dul.event_queue.put(INVALID_PDU)
            return
        self._receive(primitive)

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


def _let_go(event: Any, request: socket.socket) -> None:
    """Free a closed connection's socket, and its association if none was requested yet."""
    request.close()
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


class _BoundedServer(ThreadedAssociationServer):  # type: ignore[misc]
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


def supported_syntaxes() -> dict[str, list[str]]:
    """Transfer syntaxes of every service class that the node takes, by its UID."""
    images, prompts = transfer_syntaxes(), list(map(str, UNCOMPRESSED))
    verification = {str(sop_class.Verification): prompts}
    return (
        verification
        | dict.fromkeys(image_classes(), images)
        | dict.fromkeys(PROMPT_CLASSES, prompts)
    )


def image_classes() -> list[str]:
    """UIDs of the storage classes that are taken.

    >>> "1.2.840.10008.5.1.4.1.1.2" in image_classes()
    True
    """
    return [str(getattr(sop_class, name)) for name in IMAGE_CLASSES]


def transfer_syntaxes() -> list[str]:
    """Transfer syntaxes of images that can be decoded here: uncompressed ones come first.

    >>> transfer_syntaxes()[0]
    '1.2.840.10008.1.2.1'
    """
    return [*map(str, UNCOMPRESSED), *(str(uid) for uid in AllTransferSyntaxes if _decodable(uid))]


def _decodable(uid: UID) -> bool:
    """Whether a compressed transfer syntax has a decoder."""
    if uid in UNCOMPRESSED or not uid.is_encapsulated:
        return False
    try:
        return bool(get_decoder(uid).is_available)
    except NotImplementedError:
        return False


def server_context(certificate: Path, key: Path, authority: Path | None) -> ssl.SSLContext:
    """TLS for the node's port; with an authority, senders must show a certificate of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, certificate, key, authority)
    if authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    certificate: Path | None, key: Path | None, authority: Path | None
) -> ssl.SSLContext:
    """TLS towards the PACS, whose certificate must be of the authority; hosts are not compared."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a PACS is named by its address
    if authority is None:
        context.load_default_certs()
    _load(context, certificate, key, authority)
    return context


def _load(
    context: ssl.SSLContext, certificate: Path | None, key: Path | None, authority: Path | None
) -> None:
    """UsageError for files that are no certificates."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        if authority is not None:
            context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"the certificates cannot be used: {e}; expected PEM files") from e
