"""The kernels' cubins: compiled when first needed and cached, or ahead of time in a bundle.

A bundle keeps them in `kernels/`, with a `kernels.json` that says what each was compiled from: a
device then needs no compiler. Cubins are native code, so their SHA-256 is compared before they are
handed on, and those of other sources than this installation's are not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from medsa_deploy.bundle.atomic import write_bytes
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.bundle.strict_json import decode
from medsa_deploy.errors import BundleError, UsageError

from .compilers import HEADER, STANDARD, Compiler, find_compiler

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILENAME = "kernels.json"
FOLDER = "kernels"
"""Where a bundle keeps its cubins."""

SOURCES = ("preprocess", "postprocess")

TARGETS = ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm120")
"""What is compiled for where nothing is named: known to nvcc and NVRTC of CUDA 12.8 and newer."""


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """One compiled source."""

    path: str
    """File name, in the folder of `kernels.json`."""
    source: str
    target: str
    """Compute capability: `sm86`. A cubin is used on no other."""
    sources_sha256: str
    """See `sources_sha256`."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Everything `kernels.json` holds."""

    compiler: str
    files: tuple[Cubin, ...]
    schema: int = SCHEMA_VERSION


def source_path(source: str) -> Path:
    """The file of one of `SOURCES`."""
    return Path(__file__).parent / f"{source}.cu"


def sources_sha256(source: str) -> str:
    """SHA-256 of a source, what it includes, and the language it is compiled as."""
    parts = [source_path(source).read_bytes(), source_path(source).with_name(HEADER).read_bytes()]
    digests = [hashlib.sha256(part).hexdigest() for part in (*parts, STANDARD.encode())]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def cubin(source: str, target: str, *, bundle: Path | None = None) -> bytes:
    """The cubin of one of `SOURCES` for a GPU such as `sm86`: the bundle's, cached, or compiled.

    BundleError for a bundle whose cubin was changed; MissingDependencyError where it has to be
    compiled and there is no compiler; BuildError where compiling fails.
    """
    if bundle is not None and (shipped := _in_bundle(source, target, bundle)) is not None:
        return shipped
    path = cache_folder() / f"{source}-{target}-{sources_sha256(source)[:24]}.cubin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as e:
        logger.warning("%s cannot be read (%s): compiled again", path, e.strerror)
    compiled = _compile(find_compiler(target), source, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, compiled)
    except OSError as e:
        logger.warning("%s cannot be written (%s): it is compiled each time", path, e.strerror)
    return compiled


def build(
    bundle: Path,
    targets: Iterable[str] = TARGETS,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Kernels:
    """Compile all kernels for `targets` into a bundle, in place of what it had.

    UsageError for a target the compiler does not know. If anything fails, the bundle is what it
    was.
    """
    load_manifest(bundle)
    compiler = find_compiler()
    targets = tuple(dict.fromkeys(targets))
    if unknown := [target for target in targets if target not in compiler.targets]:
        raise UsageError(
            f"{compiler.name} does not compile for {', '.join(unknown)}; it does for: "
            f"{', '.join(compiler.targets)}"
        )
    with new_bundle(bundle / FOLDER) as folder:
        files = []
        for target in targets:
            on_step(f"compile for {target}")
            files += [_cubin_file(compiler, source, target, folder) for source in SOURCES]
        kernels = Kernels(compiler=compiler.name, files=tuple(files))
        text = json.dumps(dataclasses.asdict(kernels), indent=2, ensure_ascii=False)
        (folder / FILENAME).write_text(text + "\n", encoding="utf-8")
    return kernels


def load(bundle: Path) -> Kernels | None:
    """Read and validate a bundle's `kernels.json`; None where it has no cubins."""
    path = bundle / FOLDER / FILENAME
    again = "compile them again with medsa-deploy build-kernels"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise BundleError(f"{path} cannot be read ({e}): {again}") from e
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
        raise BundleError(
            f"{path} is not of the schema this medsa-deploy reads, version {SCHEMA_VERSION}: "
            f"{again}"
        )
    kernels = decode(Kernels, data, FILENAME)
    if any(Path(file.path).name != file.path for file in kernels.files):
        raise BundleError(f"{path} names files in other folders: {again}")
    return kernels


def cache_folder() -> Path:
    """`medsa-deploy/kernels` in $XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "medsa-deploy" / "kernels"


def _in_bundle(source: str, target: str, bundle: Path) -> bytes | None:
    """The bundle's cubin, if it has one of this installation's sources."""
    kernels = load(bundle)
    for file in kernels.files if kernels else ():
        if (file.source, file.target) != (source, target):
            continue
        path = bundle / FOLDER / file.path
        if file.sources_sha256 != sources_sha256(source):
            logger.warning("%s is of another medsa-deploy's sources: not used", path)
            return None
        try:
            content = path.read_bytes()
        except OSError as e:
            raise BundleError(f"{path} cannot be read ({e.strerror}): copy the bundle again") from e
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise BundleError(
                f"{path} is not the file that {FILENAME} describes: copy the bundle again, or "
                "compile again with medsa-deploy build-kernels"
            )
        return content
    return None


def _compile(compiler: Compiler, source: str, target: str) -> bytes:
    compiled, messages = compiler.cubin(source_path(source), target)
    if messages:
        logger.warning("%s on %s for %s: %s", compiler.name, source, target, messages)
    return compiled


def _cubin_file(compiler: Compiler, source: str, target: str, folder: Path) -> Cubin:
    """Compile one source for one target into `folder`."""
    path = folder / f"{source}-{target}.cubin"
    path.write_bytes(_compile(compiler, source, target))
    return Cubin(
        path=path.name,
        source=source,
        target=target,
        sources_sha256=sources_sha256(source),
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )
