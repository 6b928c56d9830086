"""The fastest backend and threads of a bundle on a machine ⇄ `tuning.json` in the user's folder.

Only `backend="auto"` reads it. The default backend never depends on a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsa_deploy import machine
from medsa_deploy.bundle import strict_json
from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.errors import BundleError, UsageError

from .backends.registry import BACKENDS, MOST_THREADS, BackendName

logger = logging.getLogger(__name__)

TUNABLE = tuple(spec.name for spec in BACKENDS.values() if spec.tunable)
"""The backends that are measured; the default is the first."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest backend for a bundle, by the median of a first click."""

    encoder_sha256: str
    """SHA-256 of the encoder's file, which stands for its network and precision."""
    bundle: str
    """The bundle's name when it was measured, for people."""
    machine: str
    """See `this_machine`."""
    backend: BackendName
    """One of `TUNABLE`."""
    threads: int | None
    """None for all cores, as the backend counts them."""
    first_click_ms: float
    measured: str
    """Date, YYYY-MM-DD."""


def this_machine() -> str:
    """Processor and cores; a choice is for one such machine."""
    return f"{machine.processor()}, {machine.cores()} cores"


def path() -> Path:
    """`medsa-deploy/tuning.json` in $XDG_CONFIG_HOME, or in ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "medsa-deploy" / "tuning.json"


def choices() -> list[Choice]:
    """All stored choices; an entry that cannot be read is left out, with a warning."""
    readable = []
    for i, entry in enumerate(_entries()):
        try:
            choice = strict_json.decode(Choice, entry, f"entry {i}")
            if choice.backend not in TUNABLE:
                raise BundleError(f"entry {i} has the backend {choice.backend}")
            if choice.threads is not None and not 1 <= choice.threads <= MOST_THREADS:
                raise BundleError(f"entry {i} has {choice.threads} threads")
        except BundleError as e:
            logger.warning("%s: an entry is ignored: %s", path(), e)
        else:
            readable.append(choice)
    return readable


def _entries() -> list[Any]:
    """The file's entries, unchecked; empty, with a warning, if it cannot be read."""
    try:
        entries = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as e:
        logger.warning("%s is ignored: it cannot be read (%s)", path(), e)
        return []
    if isinstance(entries, list):
        return entries
    logger.warning("%s is ignored: it is not a list of choices", path())
    return []


def stored(encoder_sha256: str) -> Choice | None:
    """The choice for an encoder on this machine."""
    key = (encoder_sha256, this_machine())
    return next((c for c in choices() if (c.encoder_sha256, c.machine) == key), None)


def store(choice: Choice) -> Path:
    """Add a choice, in place of an earlier one for the same encoder and machine; the file's path.

    UsageError if the file cannot be written.
    """
    target = path()
    new = dataclasses.asdict(choice)
    key = ("encoder_sha256", "machine")
    entries = [
        entry
        for entry in _entries()
        if not (isinstance(entry, dict) and all(entry.get(name) == new[name] for name in key))
    ]
    text = json.dumps([*entries, new], indent=2) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    except OSError as e:
        raise UsageError(
            f"{target} cannot be written ({e.strerror}): set XDG_CONFIG_HOME to a folder of yours"
        ) from e
    return target
