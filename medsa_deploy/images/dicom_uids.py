"""Texts → a DICOM UID that is always the same for them (PS3.5 B.2: 2.25 and a UUID)."""

from __future__ import annotations

import hashlib
from uuid import UUID


def derived_uid(*parts: str) -> str:
    """The UID of these texts.

    >>> derived_uid("1.2.3", "liver") == derived_uid("1.2.3", "liver") != derived_uid("1.2.3liver")
    True
    """
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return f"2.25.{UUID(bytes=digest[:16], version=5).int}"
