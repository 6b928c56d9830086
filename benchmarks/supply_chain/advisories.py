"""Known vulnerabilities of libraries: a stored list → those that hit a version; OSV → a new list.

The stored list works without a network, and says how far it reaches.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.libraries import canonical_name

ADVISORIES = Path(__file__).parent / "advisories.json"
OSV = "https://api.osv.dev/v1"
BATCH = 500
"""Queries in one request; OSV takes 1000."""
SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Advisory:
    """One range of versions of one library that a vulnerability is in."""

    library: str
    identifier: str
    """`CVE-…`, else the name of the database that it is from."""
    introduced: str = "0"
    fixed: str | None = None
    """The first version without it; None if there is none, or if `last_affected` says it."""
    last_affected: str | None = None

    def affects(self, version: str) -> bool:
        """Whether a version is in the range."""
        candidate = Version(version)
        if candidate < Version(self.introduced):
            return False
        if self.fixed is not None:
            return candidate < Version(self.fixed)
        return self.last_affected is None or candidate <= Version(self.last_affected)


@dataclass(frozen=True, kw_only=True)
class AdvisoryList:
    """Advisories, and how far they reach."""

    date: str
    """Day of the newest advisory in it, or of the refresh."""
    source: str
    advisories: tuple[Advisory, ...]

    def age_days(self, today: date) -> int:
        """Days since `date`."""
        return (today - date.fromisoformat(self.date)).days


def read_advisories(path: Path) -> AdvisoryList:
    """A stored list; ValueError if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        advisories = tuple(Advisory(**entry) for entry in data["advisories"])
        for advisory in advisories:
            advisory.affects("0")
        date.fromisoformat(data["date"])
        return AdvisoryList(date=data["date"], source=data["source"], advisories=advisories)
    except (OSError, KeyError, TypeError, InvalidVersion, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not a list of advisories ({e}): refresh it") from e


def affecting(versions: Mapping[str, str], advisories: Iterable[Advisory]) -> list[Advisory]:
    """The advisories that hit one of the versions, sorted by library."""
    hits = [a for a in advisories if a.library in versions and a.affects(versions[a.library])]
    return sorted(hits, key=lambda advisory: (advisory.library, advisory.identifier))


def refresh(names: Iterable[str], path: Path, *, server: str = OSV, today: date) -> AdvisoryList:
    """Ask OSV for every advisory of some libraries, and store them; OSError without a network.

    Stored advisories that OSV does not list stay: it has none for some libraries of C++.
    """
    stored = read_advisories(path).advisories
    queries = [{"package": {"ecosystem": "PyPI", "name": name}} for name in sorted(set(names))]
    identifiers: set[str] = set()
    while queries:
        now, queries = queries[:BATCH], queries[BATCH:]
        results = _request(f"{server}/querybatch", {"queries": now})["results"]
        for query, result in zip(now, results, strict=True):
            identifiers |= {vulnerability["id"] for vulnerability in result.get("vulns", ())}
            if token := result.get("next_page_token"):
                queries.append({**query, "page_token": token})
    records = [_request(f"{server}/vulns/{identifier}") for identifier in sorted(identifiers)]
    queried = {canonical_name(name) for name in names}
    advisories = {a for record in records for a in _ranges(record) if a.library in queried}
    listed = {(advisory.library, advisory.identifier) for advisory in advisories}
    advisories |= {a for a in stored if (a.library, a.identifier) not in listed}
    ordered = sorted(advisories, key=lambda a: (a.library, a.identifier, a.introduced))
    listing = AdvisoryList(date=today.isoformat(), source=server, advisories=tuple(ordered))
    save_advisories(listing, path)
    return listing


def save_advisories(listing: AdvisoryList, path: Path) -> None:
    """Store a list, whole or not at all."""
    entries = [
        {key: value for key, value in asdict(advisory).items() if value is not None}
        for advisory in listing.advisories
    ]
    data = {"date": listing.date, "source": listing.source, "advisories": entries}
    write_text(path, json.dumps(data, indent=1) + "\n")


def _request(url: str, body: dict[str, Any] | None = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=content, headers=headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.loads(reply.read())


def _ranges(record: dict[str, Any]) -> list[Advisory]:
    """The ranges of a record of OSV; versions that are none are left out."""
    if record.get("withdrawn"):
        return []
    identifier = next(
        (alias for alias in record.get("aliases", ()) if alias.startswith("CVE-")), record["id"]
    )
    result = []
    for affected in record.get("affected", ()):
        package = affected.get("package", {})
        if package.get("ecosystem") != "PyPI":
            continue
        for span in affected.get("ranges", ()):
            if span.get("type") == "ECOSYSTEM":
                library = canonical_name(package["name"])
                result += _spans(library, identifier, span["events"])
    return result


def _spans(library: str, identifier: str, events: list[dict[str, str]]) -> list[Advisory]:
    """Events in their order: one range for each `introduced`."""
    spans: list[dict[str, str]] = []
    for event in events:
        if "introduced" in event:
            spans.append({"introduced": event["introduced"]})
        elif spans:
            spans[-1] |= {k: event[k] for k in ("fixed", "last_affected") if k in event}
    result = []
    for span in spans:
        advisory = Advisory(library=library, identifier=identifier, **span)
        try:
            advisory.affects("0")
        except InvalidVersion:
            continue
        result.append(advisory)
    return result
