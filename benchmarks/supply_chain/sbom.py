"""What is installed here → the package's bill of materials, in CycloneDX.

    python -m benchmarks.supply_chain.sbom medsa-deploy.cdx.json

Libraries that every installation needs are `required`; those of an extra are `optional`, and name
the extras.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.bundle.sbom import PROPERTY, library_component
from medsa_deploy.libraries import describe

from .requirements import NAME, required_names

DEVELOPMENT = "dev"
"""The extra of tests and checks, which no user needs."""
Edges = dict[str, list[str]]
"""Library → the installed libraries that it requires."""


def reachable(extra: str | None) -> Edges:
    """What the package, with one of its extras, needs of what is installed here."""
    edges: Edges = {}
    waiting: list[tuple[str, frozenset[str]]] = [(NAME, frozenset({extra} if extra else ()))]
    visited = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        edges.setdefault(name, [])
        for required, further in required_names(installed.requires, set(extras)):
            waiting.append((required, frozenset(further)))
            edges[name].append(required)
    return edges


def package_sbom() -> Bom:
    """The bill of materials of the package and all libraries of its extras, `dev` left out."""
    package = distribution(NAME)
    extras = [e for e in package.metadata.get_all("Provides-Extra") or () if e != DEVELOPMENT]
    required = reachable(None)
    optional = {extra: reachable(extra) for extra in extras}
    edges = {name: set(names) for name, names in required.items()}
    for group in optional.values():
        for name, names in group.items():
            edges.setdefault(name, set()).update(names)
    components = {name: library_component(describe(distribution(name))) for name in edges}
    root = components.pop(NAME)
    root.type = ComponentType.APPLICATION
    for name, component in components.items():
        component.scope = ComponentScope.REQUIRED if name in required else ComponentScope.OPTIONAL
        users = [extra for extra, group in optional.items() if name in group]
        if name not in required:
            component.properties.add(Property(name=f"{PROPERTY}extras", value=" ".join(users)))
    bom = Bom(metadata=BomMetaData(component=root), components=components.values())
    by_name: dict[str, Component] = {NAME: root, **components}
    for name, names in edges.items():
        bom.register_dependency(by_name[name], [by_name[n] for n in sorted(names) if n in by_name])
    return bom


def main(arguments: list[str]) -> int:
    """Write the bill of materials; the exit code."""
    parser = argparse.ArgumentParser(description="Write the package's bill of materials")
    parser.add_argument("output", type=Path, nargs="?", default=Path("medsa-deploy.cdx.json"))
    output: Path = parser.parse_args(arguments).output
    bom = package_sbom()
    write_text(output, JsonV1Dot6(bom).output_as_string(indent=2) + "\n")
    print(f"{output}: {len(bom.components)} libraries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
