"""`rules.json` → rules; the facts of a series → the first rule that matches it.

{"rules": [
  {"match": {"modality": "CT", "series_description": "*portal*"},
   "bundle": "liver.medsa",
   "prompts": {"relative": true,
               "structures": [{"name": "liver", "boxes": [[0.2, 0.2, 0.3, 0.8, 0.8, 0.7]]}]},
   "propagate": true}
]}

A match is a glob for each fact, regardless of case; a fact without a glob may be anything. Paths
are relative to the file. `prompts` are described in `templates`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.images.class_codes import SegmentStyle, read_class_codes
from medsa_deploy.runtime import VolumeOptions

from .templates import PromptTemplate, parse_template

FACTS = ("modality", "body_part", "series_description", "study_description", "calling_aet")
KEYS = frozenset(
    {"match", "bundle", "prompts", "propagate", "margin", "overlap", "threshold"}
    | {"intensity_window", "measurements", "class_codes"}
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How series of one kind are segmented."""

    match: Mapping[str, str]
    """Fact of a series → the glob that it must match."""
    bundle: Path
    template: PromptTemplate
    options: VolumeOptions = field(default_factory=VolumeOptions)
    measurements: bool = False
    """Whether a report of measurements goes with each segmentation."""
    styles: Mapping[str, SegmentStyle] = field(default_factory=dict)
    identity: str
    """SHA-256 of the rule without its match: another rule makes another segmentation."""

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether every glob of the match fits its fact."""
        return all(
            fnmatch.fnmatchcase(facts.get(name, "").lower(), glob.lower())
            for name, glob in self.match.items()
        )


def matching_rule(rules: Sequence[Rule], facts: Mapping[str, str]) -> int | None:
    """The index of the first rule that matches a series; None if none does.

    >>> matching_rule([], {"modality": "CT"}) is None
    True
    """
    return next((i for i, rule in enumerate(rules) if rule.matches(facts)), None)


def read_rules(path: Path, bundle: Path) -> tuple[Rule, ...]:
    """The rules of a file; `bundle` is that of rules which name none.

    UsageError says which rule is wrong, and how.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path} is not JSON: {e}") from e
    entries = data.get("rules") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or len(data) > 1:
        raise UsageError(f'{path} should be {{"rules": […]}} with at least one rule')
    return tuple(
        _rule(entry, f"{path}: rule {i}", path.parent, bundle) for i, entry in enumerate(entries, 1)
    )


def _rule(entry: Any, place: str, folder: Path, bundle: Path) -> Rule:
    """One entry of the file; `place` names it in errors."""
    if not isinstance(entry, dict) or not set(entry) <= KEYS:
        raise UsageError(f"{place} should be an object with some of: {', '.join(sorted(KEYS))}")
    match = entry.get("match", {})
    if not isinstance(match, dict) or not set(match) <= set(FACTS):
        raise UsageError(f"{place}: its match should be an object with some of: {', '.join(FACTS)}")
    if not all(isinstance(glob, str) for glob in match.values()):
        raise UsageError(f'{place}: a match is text, such as "*portal*"')
    named = entry.get("bundle")
    if named is not None and not isinstance(named, str):
        raise UsageError(f"{place}: its bundle is {reprlib.repr(named)}, expected a path")
    try:
        template = parse_template(entry.get("prompts"), place)
    except PromptError as e:
        raise UsageError(str(e)) from e
    codes = entry.get("class_codes")
    styles = {} if codes is None else read_class_codes(folder / codes)
    acts = {key: value for key, value in entry.items() if key not in ("match", "bundle")}
    return Rule(
        match=match,
        bundle=bundle if named is None else folder / named,
        template=template,
        options=_options(entry, place),
        measurements=_flag(entry, "measurements", place),
        styles={**styles, **template.styles},
        identity=hashlib.sha256(json.dumps(acts, sort_keys=True).encode()).hexdigest(),
    )


def _options(entry: Mapping[str, Any], place: str) -> VolumeOptions:
    """How a volume is segmented, of a rule's entry."""
    window = entry.get("intensity_window")
    if not (window in (None, "auto") or _are_numbers(window, 2)):
        raise UsageError(f'{place}: its intensity_window should be [LOW, HIGH] or "auto"')
    numbers = {}
    for name in ("margin", "threshold", "overlap"):
        value = entry.get(name)
        if value is not None and not _are_numbers([value], 1):
            raise UsageError(f"{place}: its {name} is {reprlib.repr(value)}, expected a number")
        numbers[name] = value
    return VolumeOptions(
        intensity_window=tuple(window) if isinstance(window, list) else window,
        threshold=numbers["threshold"],
        overlap=int(numbers["overlap"] or 0),
        propagate=_flag(entry, "propagate", place),
        margin=numbers["margin"],
    )


def _flag(entry: Mapping[str, Any], name: str, place: str) -> bool:
    value = entry.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"{place}: its {name} is {reprlib.repr(value)}, expected true or false")
    return value


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
