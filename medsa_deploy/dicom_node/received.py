"""The file of a received object → the few facts of its header that the node goes by."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError
from medsa_deploy.images.dicom_files import content_header
from medsa_deploy.images.files import reading

from .study_prompts import PROMPT_CLASSES, referenced_series

OBJECT = Path("the object")
"""What errors call an object, which has no file yet."""

TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID",
    "SeriesInstanceUID", "Modality", "BodyPartExamined", "SeriesDescription", "StudyDescription",
    "PatientID", "AccessionNumber",
]  # fmt: skip
UID_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class ReceivedObject:
    """What the node goes by. Everything but the modality may identify a patient."""

    sop_class: str
    instance: str
    study: str
    series: str
    modality: str
    body_part: str
    series_description: str
    study_description: str
    patient: str
    accession: str
    calling_aet: str
    referenced_series: tuple[str, ...] = ()
    """Of prompts: the series that they are for."""

    @property
    def study_key(self) -> str:
        """A name for the study that says nothing."""
        return short_hash(self.study)

    @property
    def series_key(self) -> str:
        """A name for the series as this sender sends it; it starts with the study's."""
        return f"{self.study_key}-{short_hash(self.series, self.calling_aet)}"

    @property
    def is_prompt(self) -> bool:
        """Whether the object holds prompts for a series, and no image."""
        return self.sop_class in PROMPT_CLASSES

    def facts(self) -> dict[str, str]:
        """The facts that rules match."""
        texts = asdict(self)
        return {
            name: texts[name]
            for name in (
                "modality", "body_part", "series_description", "study_description", "calling_aet",
            )
        }  # fmt: skip


def short_hash(*texts: str) -> str:
    """16 hexadecimal digits that tell texts apart, and do not reveal them at a glance.

    >>> len(short_hash("1.2.840.1"))
    16
    """
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def received_object(content: bytes, calling_aet: str) -> ReceivedObject:
    """The facts of a DICOM file's bytes; ImageError if it is damaged or has no UIDs."""
    with reading(OBJECT, "DICOM"):  # pydicom raises nearly anything for damaged bytes
        prompts = any(uid.encode() in content[:1024] for uid in PROMPT_CLASSES)
        tags = None if prompts else TAGS
        header = content_header(OBJECT, content, tags)
        return ReceivedObject(
            sop_class=_uid(header, "SOPClassUID"),
            instance=_uid(header, "SOPInstanceUID"),
            study=_uid(header, "StudyInstanceUID"),
            series=_uid(header, "SeriesInstanceUID"),
            modality=_text(header, "Modality"),
            body_part=_text(header, "BodyPartExamined"),
            series_description=_text(header, "SeriesDescription"),
            study_description=_text(header, "StudyDescription"),
            patient=_text(header, "PatientID"),
            accession=_text(header, "AccessionNumber"),
            calling_aet=calling_aet,
            referenced_series=() if tags else tuple(referenced_series(header)),
        )


def _uid(header: Any, name: str) -> str:
    """A UID that must be there."""
    uid = str(header.get(name) or "")
    if not uid or len(uid) > UID_LENGTH or not set(uid) <= set("0123456789."):
        raise ImageError(f"{OBJECT} has no valid {name}; expected a UID: send it again")
    return uid


def _text(header: Any, name: str) -> str:
    """One line of text; empty if it is absent."""
    return " ".join(str(header.get(name) or "").split())
