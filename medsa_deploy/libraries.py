"""Installed Python libraries → their versions and licences, as their metadata states them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

LONGEST_LICENCE = 60
"""Metadata may hold a licence's whole text: more characters than this are no name."""
CLASSIFIER = "License :: "
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "OSI Approved :: Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 2-Clause License": "BSD-2-Clause",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
}
"""Words of metadata and of package indexes' classifiers → SPDX identifiers."""
NO_NAMES = ("", "LICENSE", "UNKNOWN")
"""Licence fields that name no licence."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed library."""

    name: str
    """As package indexes compare names: lower case, with `-`."""
    version: str
    licence: str
    """An SPDX expression, or the words of the metadata; empty if it says nothing."""


def canonical_name(name: str) -> str:
    """A library's name as package indexes compare it.

    >>> canonical_name("Segment_Anything")
    'segment-anything'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_library(name: str) -> Library | None:
    """A library by name; None if it is not installed.

    >>> installed_library("numpy").licence.startswith("BSD")
    True
    """
    try:
        return describe(distribution(name))
    except PackageNotFoundError:
        return None


def describe(installed: Distribution) -> Library:
    """Name, version and licence of a distribution."""
    return Library(
        name=canonical_name(installed.metadata["Name"]),
        version=installed.version,
        licence=_licence(installed),
    )


def _licence(installed: Distribution) -> str:
    """1. The SPDX expression. 2. A short licence field. 3. The classifiers."""
    metadata = installed.metadata
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    field = str((metadata.get_all("License") or [""])[0]).strip()
    classifiers = [
        classifier.rpartition(" :: ")[2]
        for classifier in metadata.get_all("Classifier") or ()
        if classifier.startswith(CLASSIFIER)
    ]
    named = [SPDX.get(words, words) for words in classifiers if words != "OSI Approved"]
    if field not in NO_NAMES and len(field) <= LONGEST_LICENCE and "\n" not in field:
        return SPDX.get(field, field)
    return " OR ".join(dict.fromkeys(named))
