"""Pinned and lowest versions, installed licences → a report; exit code 1 if something is amiss.

    python -m benchmarks.supply_chain.audit
    python -m benchmarks.supply_chain.audit --refresh      asks OSV for advisories first

Without a network the stored advisories are used, and the report says how old they are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from medsa_deploy.libraries import Library, describe

from .advisories import (
    ADVISORIES,
    OSV,
    Advisory,
    AdvisoryList,
    affecting,
    read_advisories,
    refresh,
)
from .requirements import NAME, ROOT, lowest_versions, pinned_versions

LICENCES = Path(__file__).parent / "licences.json"
STALE_DAYS = 30
"""Age at which the report says that advisories are stale."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The licences that libraries may have."""

    allowed: frozenset[str]
    """SPDX identifiers."""
    exceptions: Mapping[str, str]
    """Library → the reason why it is allowed all the same."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of an audit."""

    pinned: tuple[Advisory, ...]
    """Advisories that hit a pinned version."""
    lowest: tuple[Advisory, ...]
    """Advisories that hit the lowest version that pyproject.toml allows."""
    licences: tuple[str, ...]
    """Libraries whose licence is not allowed, with the licence."""
    unpinned: tuple[str, ...]
    """Libraries that are installed and not pinned."""

    @property
    def passed(self) -> bool:
        """Whether nothing is amiss. Libraries without a pin are only listed."""
        return not (self.pinned or self.lowest or self.licences)


def read_policy(path: Path) -> Policy:
    """The policy in a JSON file; ValueError if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Policy(allowed=frozenset(data["allowed"]), exceptions=dict(data["exceptions"]))
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a licence policy ({e})") from e


def refused_licences(installed: list[Library], policy: Policy) -> list[str]:
    """Libraries whose licence the policy does not allow: `NAME: LICENCE`."""
    return [
        f"{library.name}: {library.licence or 'none stated'}"
        for library in installed
        if library.name not in policy.exceptions and not is_allowed(library.licence, policy)
    ]


def is_allowed(expression: str, policy: Policy) -> bool:
    """Whether an SPDX expression is allowed: each part of AND, and any part of OR."""
    parts = re.split(r"\s+AND\s+", expression.replace("(", " ").replace(")", " "))
    return all(
        any(choice.strip() in policy.allowed for choice in re.split(r"\s+OR\s+", part))
        for part in parts
    )


def audit(
    pins: dict[str, str], lowest: dict[str, str], policy: Policy, listing: AdvisoryList
) -> Audit:
    """Compare versions with advisories, and licences with the policy."""
    libraries = _installed()
    pinned = [libraries[name] for name in sorted(libraries) if name in pins]
    return Audit(
        pinned=tuple(affecting(pins, listing.advisories)),
        lowest=tuple(affecting(lowest, listing.advisories)),
        licences=tuple(refused_licences(pinned, policy)),
        unpinned=tuple(sorted(set(libraries) - set(pins))),
    )


@cache
def _installed() -> dict[str, Library]:
    """Name → library of everything that is installed here, except this package."""
    libraries = (describe(installed) for installed in distributions())
    return {library.name: library for library in libraries if library.name != NAME}


def report(result: Audit, listing: AdvisoryList, counts: tuple[int, int], today: date) -> str:
    """The result in words. `counts`: pinned libraries, libraries with a lowest version."""
    age = listing.age_days(today)
    stale = f"; STALE: {age} days old, make audit REFRESH=1" if age > STALE_DAYS else ""
    lines = [
        f"advisories   {len(listing.advisories)} up to {listing.date}, {listing.source}{stale}",
        f"pinned       {counts[0]} libraries, {len(result.pinned)} advisories hit them",
        *(f"             {_words(advisory)}" for advisory in result.pinned),
        f"lowest       {counts[1]} libraries, {len(result.lowest)} advisories hit them",
        *(f"             {_words(advisory)}" for advisory in result.lowest),
        f"licences     {len(result.licences)} not allowed",
        *(f"             {line}" for line in result.licences),
        f"not pinned   {', '.join(result.unpinned) or 'none'}",
        "passed" if result.passed else "FAILED",
    ]
    return "\n".join(lines)


def _words(advisory: Advisory) -> str:
    fixed = f"fixed in {advisory.fixed}" if advisory.fixed else "no fixed version is known"
    if advisory.last_affected:
        fixed = f"last in {advisory.last_affected}"
    return f"{advisory.library}: {advisory.identifier}, {fixed}"


def main(arguments: list[str]) -> int:
    """Print the report; 0 if nothing is amiss, 1 if something is, 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description="Audit the libraries that this package needs")
    parser.add_argument("--refresh", action="store_true", help="ask OSV for advisories first")
    parser.add_argument("--server", default=OSV, help="address of OSV's interface")
    parser.add_argument("--advisories", type=Path, default=ADVISORIES)
    parser.add_argument("--licences", type=Path, default=LICENCES)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(arguments)
    today = datetime.now(UTC).date()
    try:
        pins = pinned_versions(options.constraints)
        lowest = lowest_versions(ROOT / "pyproject.toml")
        policy = read_policy(options.licences)
        if options.refresh:
            try:
                refresh({*pins, *lowest}, options.advisories, server=options.server, today=today)
            except OSError as e:
                print(f"not refreshed: {options.server} does not answer ({e})", file=sys.stderr)
        listing = read_advisories(options.advisories)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    result = audit(pins, lowest, policy, listing)
    print(report(result, listing, (len(pins), len(lowest)), today))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
