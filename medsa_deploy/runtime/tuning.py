"""The fastest backend and threads of a bundle on a machine ⇄ `tuning.json` in the user's folder.

Only `backend="auto"` reads it; what runs by default never depends on a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medsa_deploy import machine
from medsa_deploy.bundle import strict_json
from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.errors import BundleError, UsageError

logger = logging.getLogger(__name__)

Tuned = Literal["onnxruntime", "openvino"]
TUNED: tuple[Tuned, ...] = get_args(Tuned)
"""Backends on a processor, among which a choice is made."""
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was fastest, by the median of a first click."""

    encoder_sha256: str
    """Of the encoder's file, which says which network and precision this is for."""
    bundle: str
    """The bundle's name then, for people."""
    machine: str
    """See `this_machine`."""
    backend: Tuned
    threads: int | None
    """None for all cores, as the backend counts them."""
    first_click_ms: float
    measured: str
    """Date, YYYY-MM-DD."""


def this_machine() -> str:
    """Processor and cores: what a choice holds for."""
    return f"{machine.processor()}, {machine.cores()} cores"


def path() -> Path:
    """`medsa-deploy/tuning.json` in $XDG_CONFIG_HOME, or in ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "medsa-deploy" / "tuning.json"


def choices() -> list[Choice]:
    """Everything that is stored; what cannot be read is left out, with a warning."""
    found = []
    for i, entry in enumerate(_entries()):
        try:
            choice = strict_json.decode(Choice, entry, f"entry {i}")
            if choice.threads is not None and not 1 <= choice.threads <= MOST_THREADS:
                raise BundleError(f"entry {i} has {choice.threads} threads")
        except BundleError as e:
            logger.warning("%s: an entry is ignored: %s", path(), e)
        else:
            found.append(choice)
    return found


def _entries() -> list[Any]:
    """What the file holds, unchecked; nothing, with a warning, where it cannot be read."""
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
    here = this_machine()
    for choice in choices():
        if (choice.encoder_sha256, choice.machine) == (encoder_sha256, here):
            return choice
    return None


def store(choice: Choice) -> Path:
    """Add a choice, in place of an earlier one for the same encoder and machine; the file."""
    target = path()
    made = dataclasses.asdict(choice)
    key = ("encoder_sha256", "machine")
    kept = [
        entry
        for entry in _entries()
        if not (isinstance(entry, dict) and all(entry.get(name) == made[name] for name in key))
    ]
    text = json.dumps([*kept, made], indent=2) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    except OSError as e:
        raise UsageError(
            f"{target} cannot be written ({e.strerror}): set XDG_CONFIG_HOME to a folder of yours"
        ) from e
    return target
