"""Associations → objects in the spool: the C-ECHO and C-STORE service of the node.

Objects that are too large are refused; `bounded_port` bounds what is kept of them as they come.
"""

from __future__ import annotations

import errno
import functools
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError, MissingDependencyError, UsageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.images.limits import size_text
from medsa_deploy.metrics import Metrics

from .bounded_port import MOST_PDU, SILENCE_SECONDS, BoundedHandler, BoundedServer, Room
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
REQUEST_SECONDS = 15.0
"""Time from a connection to the request of its association."""
MOST_ASSOCIATIONS = 20
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
        most_at_once: int = MOST_OBJECT,
    ) -> None:
        """`allowed`: AE titles that may send; none for all. `most_object`: bytes of an object.
        `most_at_once`: bytes of all objects that come at the same time; one always finds room.

        OSError if the port is taken.
        """
        self.inbox, self.events, self.metrics = inbox, events, metrics
        self.most_object = most_object
        # an object that is too large is known by one byte more
        self._room = Room(max(most_at_once, most_object + 1), self._full)
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
            server_class=BoundedServer,
            ssl_context=tls,
            request_handler=functools.partial(
                BoundedHandler, most_object=most_object, room=self._room
            ),
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
        try:
            return self._stored(event)
        finally:
            event.assoc.dimse.receive_primitive.let_go(event.request.DataSet.getbuffer().nbytes)

    def _stored(self, event: Any) -> int:
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

    def _full(self) -> None:
        """The objects that come at the same time have no room for another fragment."""
        self.metrics.count("medsa_images_refused_total", reason="too much at once")
        self.events.write("refused", reason="too much at once")

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
