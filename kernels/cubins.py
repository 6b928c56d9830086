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
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from medsa_deploy.bundle.atomic import write_bytes
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.bundle.strict_json import decode
from medsa_deploy.errors import BuildError, BundleError, MissingDependencyError, UsageError

from .compilers import HEADER, STANDARD, VIRTUAL, Compiler, find_compiler

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILENAME = "kernels.json"
FOLDER = "kernels"
"""Where a bundle keeps its cubins."""

SOURCES = ("preprocess", "postprocess")

TARGETS = (
    *("sm75", "sm80", "sm86", "sm87", "sm89", "sm90"),
    *("sm100", "sm103", "sm110", "sm120", "sm121", "compute75"),
)
"""What is compiled for where nothing is named, as far as the compiler knows it: 8.7 is Orin, 11.0
Thor, 12.1 Spark. The last is PTX, for GPUs that are newer than all of these."""

JETSONS = ("sm72", "sm87", "sm88", "sm101", "sm110")
"""Capabilities whose cubins fit no others."""

Module = TypeVar("Module")


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """One compiled source."""

    path: str
    """File name, in the folder of `kernels.json`."""
    source: str
    target: str
    """Compute capability: `sm86`; `compute75` for PTX."""
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


def load_kernels(
    source: str,
    target: str,
    load_module: Callable[[bytes], Module],
    *,
    bundle: Path | None = None,
    driver_cuda: int | None = None,
) -> Module:
    """One of `SOURCES` as a driver loads it for a GPU such as `sm86`: the first form it accepts.

    1. The bundle's cubin for this GPU, then for lower minor versions of its capability.
    2. A cubin that was compiled here before, by the compiler that is here.
    3. One that is compiled now. It is cached once the driver has accepted it.
    4. PTX, which the driver compiles itself: the bundle's, or compiled now.

    load_module: gives the module; BuildError if the driver refuses the code. driver_cuda: major
    version of the newest CUDA that it runs. BundleError for a bundle whose cubin was changed;
    MissingDependencyError where there is nothing to load and no compiler; BuildError if the driver
    refuses every form, or compiling fails.
    """
    problems: list[BuildError | MissingDependencyError] = []
    for form in _forms(source, target, bundle, driver_cuda):
        try:
            content = form.read()
        except (BuildError, MissingDependencyError) as e:
            problems.append(e)
            continue
        if content is None:
            continue
        try:
            module = load_module(content)
        except BuildError as e:
            logger.warning("kernels %s (%s): %s", source, form.origin, e)
            problems.append(e)
            form.drop()
            continue
        form.keep(content)
        return module
    raise problems[0]


def cubin(source: str, target: str, *, bundle: Path | None = None) -> bytes:
    """The bytes that `load_kernels` would load first."""
    return load_kernels(source, target, bytes, bundle=bundle)


def build(
    bundle: Path,
    targets: Iterable[str] = (),
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Kernels:
    """Compile all kernels for `targets` into a bundle, in place of what it had.

    Without targets, for those of `TARGETS` that the compiler knows. UsageError for a target that it
    does not know. If anything fails, the bundle is what it was.
    """
    load_manifest(bundle)
    compiler = find_compiler()
    known = {form.replace("sm", kind) for form in compiler.targets for kind in ("sm", VIRTUAL)}
    defaults = (target for target in TARGETS if target in known)
    targets = tuple(dict.fromkeys(targets or defaults))
    if unknown := [target for target in targets if target not in known]:
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


def takes_cubins(target: str, known_targets: Iterable[str]) -> bool:
    """Whether a GPU takes code that was compiled for one of the targets.

    >>> takes_cubins("sm87", ["sm86", "sm89"]), takes_cubins("sm87", ["compute75"])
    (False, True)
    """
    targets = tuple(known_targets)
    return bool(_compatible(target, targets)) or any(_takes_ptx(target, t) for t in targets)


def cache_folder() -> Path:
    """`medsa-deploy/kernels` in $XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "medsa-deploy" / "kernels"


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One way to have the kernels of a source for a GPU."""

    origin: str
    read: Callable[[], bytes | None]
    """Gives the code; None if there is none."""
    cache: Path | None = None
    compiled: bool = False
    """Whether it is compiled now, so that it is cached once the driver has accepted it."""

    def keep(self, content: bytes) -> None:
        """Cache what the driver accepted."""
        if self.cache is None or not self.compiled:
            return
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.cache, content)
        except OSError as e:
            problem = "%s cannot be written (%s): it is compiled each time"
            logger.warning(problem, self.cache, e.strerror)

    def drop(self) -> None:
        """Remove what the driver refused from the cache."""
        if self.cache is not None:
            with suppress(OSError):
                self.cache.unlink(missing_ok=True)


def _forms(
    source: str, target: str, bundle: Path | None, driver_cuda: int | None
) -> Iterator[_Form]:
    """The forms of a source that a GPU can take, best first. See `load_kernels`."""
    shipped = {} if bundle is None else _in_bundle(source, bundle)
    for known in _compatible(target, shipped):
        yield _Form(origin=f"the bundle's for {known}", read=partial(_verified, shipped[known]))
    try:
        compiler = find_compiler(target, driver_cuda)
    except MissingDependencyError:
        compiler = None
    for path in _cached(source, target, compiler):
        yield _Form(origin=str(path), read=partial(_read_cached, path), cache=path)
    if compiler is None or target in compiler.targets:
        cache = None if compiler is None else _cache_path(source, target, compiler)
        compile_now = partial(_compile_for, source, target, driver_cuda)
        yield _Form(origin="compiled here", read=compile_now, cache=cache, compiled=True)
    for known in sorted((t for t in shipped if _takes_ptx(target, t)), key=_number, reverse=True):
        yield _Form(origin=f"the bundle's {known}", read=partial(_verified, shipped[known]))
    if compiler is not None:
        virtual = [f"{VIRTUAL}{_number(known)}" for known in compiler.targets]
        newest = max((t for t in virtual if _takes_ptx(target, t)), key=_number, default=target)
        compile_now = partial(_compile_for, source, newest, driver_cuda)
        yield _Form(origin=f"{newest}, compiled here", read=compile_now)


def _compatible(target: str, known_targets: Iterable[str]) -> list[str]:
    """Targets whose cubins a GPU takes: its own first, then lower minors of the same major.

    Jetsons take their own only, and theirs fit no other GPU (CUDA C++ Programming Guide, binary
    compatibility).
    """
    number = _number(target)
    lower = [
        known
        for known in known_targets
        if known.startswith("sm")
        and _number(known) // 10 == number // 10
        and _number(known) < number
        and not {known, target} & set(JETSONS)
    ]
    exact = [target] if target in known_targets else []
    return exact + sorted(lower, key=_number, reverse=True)


def _takes_ptx(target: str, known: str) -> bool:
    """Whether a target of PTX, such as `compute75`, is for a GPU or an older one."""
    return known.startswith(VIRTUAL) and _number(known) <= _number(target)


def _number(target: str) -> int:
    """86 of `sm86` and `compute86`."""
    return int(re.sub(r"\D", "", target) or 0)


def _in_bundle(source: str, bundle: Path) -> dict[str, tuple[Path, str]]:
    """Target → file and SHA-256 of a bundle's code, of this installation's sources."""
    kernels, shipped = load(bundle), {}
    for file in kernels.files if kernels else ():
        if file.source != source:
            continue
        path = bundle / FOLDER / file.path
        if file.sources_sha256 == sources_sha256(source):
            shipped[file.target] = (path, file.sha256)
        else:
            logger.warning("%s is of another medsa-deploy's sources: not used", path)
    return shipped


def _verified(file: tuple[Path, str]) -> bytes:
    """The content of a bundle's file; BundleError unless it has the SHA-256."""
    path, digest = file
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}): copy the bundle again") from e
    if hashlib.sha256(content).hexdigest() != digest:
        raise BundleError(
            f"{path} is not the file that {FILENAME} describes: copy the bundle again, or "
            "compile again with medsa-deploy build-kernels"
        )
    return content


def _cache_path(source: str, target: str, compiler: Compiler) -> Path:
    """Where a cubin is cached: another compiler's, or another source's, is another file."""
    compiler_name = re.sub(r"[^\w.]+", "_", compiler.name)
    return cache_folder() / f"{source}-{target}-{compiler_name}-{sources_sha256(source)[:24]}.cubin"


def _cached(source: str, target: str, compiler: Compiler | None) -> list[Path]:
    """Cubins that may be cached: those of the compiler that is here, of any if there is none."""
    if compiler is not None:
        return [_cache_path(source, target, compiler)]
    return sorted(cache_folder().glob(f"{source}-{target}-*-{sources_sha256(source)[:24]}.cubin"))


def _read_cached(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        logger.warning("%s cannot be read (%s): compiled again", path, e.strerror)
        return None


def _compile_for(source: str, target: str, driver_cuda: int | None) -> bytes:
    return _compile(find_compiler(target, driver_cuda), source, target)


def _compile(compiler: Compiler, source: str, target: str) -> bytes:
    compiled, messages = compiler.cubin(source_path(source), target)
    if messages:
        logger.warning("%s on %s for %s: %s", compiler.name, source, target, messages)
    return compiled


def _cubin_file(compiler: Compiler, source: str, target: str, folder: Path) -> Cubin:
    """Compile one source for one target into `folder`."""
    suffix = "ptx" if target.startswith(VIRTUAL) else "cubin"
    path = folder / f"{source}-{target}.{suffix}"
    path.write_bytes(_compile(compiler, source, target))
    return Cubin(
        path=path.name,
        source=source,
        target=target,
        sources_sha256=sources_sha256(source),
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )
