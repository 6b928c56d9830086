"""A bundle's manifest and the libraries that wrote it → `sbom.json`, a CycloneDX bill of materials.

It lists the checkpoint, every file with its SHA-256 and how its precision was made, and each
library with its licence. The commands that write it need CycloneDX's library. A device never reads
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsa_deploy import libraries
from medsa_deploy.errors import BundleError, MissingDependencyError, one_line
from medsa_deploy.libraries import Library

from .atomic import write_text
from .files import describe_file
from .manifest import File, Manifest

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

SBOM_FILENAME = "sbom.json"
PROPERTY = "medsa-deploy:"
"""Beginning of the names of properties that CycloneDX does not define."""


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """A file in a bill of materials."""

    path: str
    sha256: str
    properties: dict[str, str]
    """Role, precision…"""
    ancestors: tuple[str, ...] = ()
    """Names of the files that it was made from."""
    steps: str | None = None
    """How it was made from them, in words."""


def require_library(extra: str) -> None:
    """MissingDependencyError, which names `extra`, unless bills of materials can be written."""
    try:
        import cyclonedx.model.bom  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError(
            "cyclonedx-python-lib", extra=extra, purpose="writing a bundle's bill of materials"
        ) from e


def write_sbom(
    folder: Path,
    manifest: Manifest,
    names: Iterable[str],
    *,
    command: str,
    earlier: Path | None = None,
) -> Manifest:
    """Write `sbom.json` into `folder`; the manifest with its entry.

    `names`: libraries that `command` used; those that are not installed are left out. `earlier`:
    the bundle's present file, if it has one, whose libraries are listed too. BundleError if that
    cannot be read.

    >>> manifest = write_sbom(folder, manifest, ["numpy"], command="export")
    """
    installed = (libraries.installed_library(name) for name in ("medsa-deploy", *names))
    text = sbom_text(
        manifest,
        [_listed(file, manifest) for file in manifest.files if file.role != "sbom"],
        [library for library in installed if library is not None],
        command=command,
        earlier=earlier,
    )
    write_text(folder / SBOM_FILENAME, text)
    entry = describe_file(folder / SBOM_FILENAME, folder, role="sbom", precision="fp32")
    files = (file for file in manifest.files if file.role != "sbom")
    return replace(manifest, files=(*files, entry))


def sbom_text(
    manifest: Manifest,
    files: Sequence[ListedFile],
    used: Sequence[Library],
    *,
    command: str,
    earlier: Path | None = None,
) -> str:
    """The text of a bill of materials; see `write_sbom`."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    network, source = manifest.network, manifest.source
    bundle = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=Path(source.checkpoint).stem or "bundle",
        version=source.sha256[:12],
        bom_ref="bundle",
        properties=_properties(
            {"family": network.family, "encoder": network.encoder, "container": source.container}
        ),
    )
    tools = [library_component(library, command) for library in used]
    components = {str(c.bom_ref): c for c in (*_sources(manifest), *_files(files), *tools)}
    for component in _libraries_of(earlier):
        entry = components.setdefault(str(component.bom_ref), component)
        entry.properties.update(component.properties)
    writer = next((c for c in tools if c.name == "medsa-deploy"), None)
    bom = Bom(
        metadata=BomMetaData(component=bundle, tools=[] if writer is None else _tool(writer)),
        components=components.values(),
    )
    bom.register_dependency(bundle, list(components.values()))
    text: str = JsonV1Dot6(bom).output_as_string(indent=2)
    return text + "\n"


def library_component(library: Library, command: str | None = None) -> Component:
    """A library's entry, with its licence and the command that used it."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", None, library.name, library.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=library.name,
        version=library.version,
        bom_ref=f"{library.name}=={library.version}",
        purl=purl,
        licenses=[_licence(library.licence)] if library.licence else [],
        properties=_properties({f"used-by:{command}": "true"} if command else {}),
    )


def _licence(words: str) -> License:
    """SPDX identifier or expression, or a name in words."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return LicenseFactory().make_from_string(words)


def _tool(component: Component) -> Any:
    """The writer of a bill of materials, as its metadata names it."""
    from cyclonedx.model.tool import ToolRepository

    return ToolRepository(components=[component])


def _sources(manifest: Manifest) -> list[Component]:
    """The checkpoint, and the base that it belongs to."""
    source = manifest.source
    named = {"checkpoint": (source.checkpoint, source.sha256)}
    if source.base is not None and source.base_sha256 is not None:
        named["base checkpoint"] = (source.base, source.base_sha256)
    return [
        _file_component(ListedFile(path=name, sha256=digest, properties={"role": role}), role)
        for role, (name, digest) in named.items()
    ]


def _files(files: Sequence[ListedFile]) -> list[Component]:
    """Entries of files; those of a shared path, which two precisions use, are one entry."""
    components: dict[str, Component] = {}
    for file in files:
        component = _file_component(file, f"file:{file.path}")
        if file.path in components:
            components[file.path].properties.update(component.properties)
        else:
            components[file.path] = component
    return list(components.values())


def _file_component(file: ListedFile, reference: str) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    pedigree = None
    if file.ancestors or file.steps:
        ancestors = [Component(type=ComponentType.FILE, name=name) for name in file.ancestors]
        pedigree = Pedigree(ancestors=ancestors, notes=file.steps)
    return Component(
        type=ComponentType.FILE,
        name=file.path,
        bom_ref=reference,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
        properties=_properties(file.properties),
        pedigree=pedigree,
    )


def _listed(file: File, manifest: Manifest) -> ListedFile:
    """A manifest's file with its pedigree: the checkpoint, or the float32 graphs and the recipe."""
    properties = {"role": file.role, "precision": file.precision}
    if file.opset is not None:
        properties["opset"] = str(file.opset)
    recipe = manifest.recipe(file.precision)
    float32 = sorted(f.path for f in manifest.files if (f.role, f.precision) == (file.role, "fp32"))
    derived = recipe is not None and file.path not in float32
    return ListedFile(
        path=file.path,
        sha256=file.sha256,
        properties=properties,
        ancestors=tuple(float32) if derived else (manifest.source.checkpoint,),
        steps=_steps(manifest, file.precision) if derived else "exported in float32",
    )


def _steps(manifest: Manifest, precision: str) -> str:
    """How a precision's graphs were made from the float32 graphs, in words."""
    recipe = manifest.recipe(precision)
    assert recipe is not None
    steps = [f"{precision} for {recipe.target}"]
    steps += [f"{island.nodes} nodes in float32: {island.reason}" for island in recipe.islands]
    if recipe.float32_blocks:
        steps.append(f"blocks in float32: {', '.join(recipe.float32_blocks)}")
    if recipe.quantized:
        steps.append(f"{len(recipe.quantized)} linear layers in INT8")
    if recipe.left_out:
        steps.append(f"linear layers left out: {', '.join(recipe.left_out)}")
    if calibration := recipe.calibration:
        steps.append(f"calibrated on {calibration.images} images, {calibration.method}")
    return "; ".join(steps)


def _properties(values: dict[str, str]) -> list[Any]:
    from cyclonedx.model import Property

    return [Property(name=f"{PROPERTY}{name}", value=value) for name, value in values.items()]


def _libraries_of(path: Path | None) -> list[Component]:
    """The libraries that an earlier bill of materials lists."""
    if path is None:
        return []
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import ComponentType

    try:
        bom: Any = Bom.from_json(json.loads(path.read_text(encoding="utf-8")))
    except Exception as e:  # whatever the library raises for a file that it did not write
        raise BundleError(
            f"{path} cannot be read ({one_line(e)}): export the checkpoint again"
        ) from e
    return [c for c in bom.components if c.type is ComponentType.LIBRARY]
