"""Texts of files and of libraries → what a message or a log may say.

A damaged file can have a patient's name anywhere, also where a UID or a number belongs, and
libraries quote what they cannot read. So texts of a file are never repeated: codes are printed if
they are known, UIDs if they are made of digits and points, and quotations of libraries are cut.
"""

from __future__ import annotations

import re
from collections.abc import Collection

UID = re.compile(r"[0-9]+(?:\.[0-9]+)+")
MOST_UID = 64
QUOTED = re.compile(r"(?<!\w)b?(['\"])(?:.*\1(?!\w)|.*$)", re.S)
"""A quotation, up to the last such mark, since a quoted text may have marks in it, or to the end of
the message; an apostrophe within a word is none."""
SHORT_NUMBER = re.compile(r"-?\d{1,5}[.,]\d{0,4}")
"""A number that is too short for a patient's ID; it has a separator, so it is no date's part."""
MOST_TEXT = 200
MODALITIES = frozenset(
    "AR BI CR CT DX ECG ES GM IO IVOCT IVUS KER LEN MG MR NM OAM OCT OP OPM OPT OPV OT PT PX REG "
    "RF RG RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SM SR TG US VA XA XC".split()
)
"""Codes of modalities (PS3.3 C.7.3.1.1.1)."""
PHOTOMETRIC = frozenset(
    "MONOCHROME1 MONOCHROME2 PALETTE_COLOR RGB HSV ARGB CMYK YBR_FULL YBR_FULL_422 YBR_PARTIAL_420 "
    "YBR_PARTIAL_422 YBR_ICT YBR_RCT XYB".split()
)
"""Photometric interpretations (PS3.3 C.7.6.3.1.2), with underscores for blanks."""


def library_text(error: BaseException | Warning | str) -> str:
    """A library's text in one line of at most 200 characters, without what it quotes.

    An OSError says what the system says, without the path.

    >>> library_text(ValueError("could not convert string to float: 'DOE^JANE'"))
    'could not convert string to float: …'
    >>> library_text(ValueError("the header doesn't end"))
    "the header doesn't end"

    A short number is repeated, since people look for decimal commas:

    >>> library_text(ValueError("could not convert string to float: '40,5'"))
    "could not convert string to float: '40,5'"
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = QUOTED.sub(_quotation, " ".join(str(error).split()))
    words = ["…" if "^" in word or not word.isprintable() else word for word in text.split(" ")]
    text = " ".join(words).strip()
    if not text and not isinstance(error, str):
        return type(error).__name__
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"


def _quotation(match: re.Match[str]) -> str:
    """A short number as it is quoted, anything else as an ellipsis."""
    return match[0] if SHORT_NUMBER.fullmatch(match[0].strip("b'\"")) else "…"


def uid_text(value: object) -> str:
    """A UID; `an invalid UID` for anything else.

    >>> uid_text("1.2.840.10008.1.2"), uid_text("DOE^JANE")
    ('1.2.840.10008.1.2', 'an invalid UID')
    """
    text = str(value or "")
    return text if len(text) <= MOST_UID and UID.fullmatch(text) else "an invalid UID"


def uid_name(uid: object) -> str:
    """The name of a UID in the standard, or the UID."""
    from pydicom.uid import UID_dictionary

    known = UID_dictionary.get(str(uid))
    return uid_text(uid) if known is None else known[0]


def code_text(value: object, codes: Collection[str]) -> str:
    """A code, if it is one of `codes`; `none` for an empty one.

    >>> code_text("CT", MODALITIES), code_text("DOE", MODALITIES), code_text(None, MODALITIES)
    ('CT', 'an unknown code', 'none')
    """
    text = " ".join(str(value or "").split())
    if not text:
        return "none"
    return text if text in codes or text.replace(" ", "_") in codes else "an unknown code"


def number_text(value: object) -> str:
    """A number in at most 16 characters; `?` for anything else.

    >>> number_text("3"), number_text("3 DOE"), number_text(None)
    ('3', '?', '?')
    """
    text = str(value).strip()
    try:
        float(text)
    except ValueError:
        return "?"
    return text if len(text) <= 16 else "?"
