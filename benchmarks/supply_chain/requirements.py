"""pyproject.toml and constraints.txt → the libraries, lowest and pinned versions they name."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

from medsa_deploy.libraries import canonical_name

ROOT = Path(__file__).parents[2]
NAME = "medsa-deploy"


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Name → version of a file with lines `NAME==VERSION`; ValueError for another line."""
    pins = {}
    for number, line in enumerate(constraints.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            name, equals, version = text.partition("==")
            if not equals:
                raise ValueError(
                    f"{constraints}, line {number} is {text!r}, expected NAME==VERSION"
                )
            pins[canonical_name(name)] = version
    return pins


def lowest_versions(pyproject: Path) -> dict[str, str]:
    """Name → the lowest version that a user's installation may have."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
    ]
    lowest = {}
    for text in (text for group in groups for text in group):
        requirement = Requirement(text)
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                lowest[canonical_name(requirement.name)] = specifier.version
    return lowest


def required_names(requirements: list[str] | None, extras: set[str]) -> list[tuple[str, set[str]]]:
    """Names and extras of the requirements that apply here, with some extras of their owner."""
    environment = {key: str(value) for key, value in default_environment().items()}
    result = []
    for text in requirements or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate(environment | {"extra": extra}) for extra in ("", *extras)
        ):
            result.append((canonical_name(requirement.name), set(requirement.extras)))
    return result
