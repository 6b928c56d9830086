"""This machine → Python, processor, libraries by extra, backends, and what is missing."""

from __future__ import annotations

import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from medsa_deploy import __version__, machine
from medsa_deploy.runtime import tuning
from medsa_deploy.runtime.tuning import Choice

PACKAGE = "medsa-deploy"
RUNTIME = "runtime"
"""Name of the plain install, beside the extras."""
FOR_DEVELOPERS = "dev"
"""The extra that a user never needs, so it is not reported."""
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^]]*)\])?"
    r"(?:.*;.*\bextra\s*==\s*[\"'](?P<of>[^\"']+)[\"'])?"
)
"""The parts of a requirement that matter here, as metadata has it:
`medsa-deploy[export]>=0.1; extra == "demo"`."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Hardware, libraries and backends of this machine."""

    medsa_deploy: str
    python: str
    system: str
    processor: str
    cores: int
    memory_gb: float | None
    """Installed memory; None if the system does not report it."""
    libraries: dict[str, dict[str, str | None]]
    """Extra → library → version; None if the library is not installed. The plain install is
    `runtime`."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers."""
    nvidia_driver: bool
    tuning: tuple[Choice, ...]
    """Choices that `--tune` stored on this machine, for the backend `auto`."""
    problems: tuple[str, ...]
    """Problems that keep the plain install from working, and their remedies."""


def diagnose() -> Diagnosis:
    """Look at the machine and the installed libraries; only ONNX Runtime is imported."""
    libraries = {
        extra: {name: _version(name) for name in names}
        for extra, names in libraries_by_extra().items()
    }
    providers, problem = _providers()
    missing = [name for name, number in libraries[RUNTIME].items() if number is None]
    if _version("onnxruntime-gpu") is not None:
        missing = [name for name in missing if name != "onnxruntime"]
    problems = [f"{name} is missing: pip install {PACKAGE}" for name in missing]
    this_machine = tuning.this_machine()
    return Diagnosis(
        medsa_deploy=__version__,
        python=platform.python_version(),
        system=machine.system(),
        processor=machine.processor(),
        cores=machine.cores(),
        memory_gb=machine.memory_gb(),
        libraries=libraries,
        providers=providers,
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        tuning=tuple(c for c in tuning.choices() if c.machine == this_machine),
        problems=(*problems, *([problem] if problem else [])),
    )


def libraries_by_extra() -> dict[str, tuple[str, ...]]:
    """This package's metadata → the libraries of each extra, and of the plain install as `runtime`.

    An extra that contains another (`medsa-deploy[export]`) has the other's libraries too.
    """
    libraries: dict[str, list[str]] = {RUNTIME: []}
    contained: dict[str, list[str]] = {}
    for requirement in requires(PACKAGE) or ():
        match = REQUIREMENT.match(requirement)
        assert match is not None
        extra, name = match["of"] or RUNTIME, match["name"]
        libraries.setdefault(extra, [])
        if name == PACKAGE:
            contained.setdefault(extra, []).extend(re.split(r"\s*,\s*", match["extras"]))
        else:
            libraries[extra].append(name)

    def all_of(extra: str) -> list[str]:
        inner = [name for other in contained.get(extra, ()) for name in all_of(other)]
        return [*inner, *libraries[extra]]

    return {
        extra: tuple(dict.fromkeys(all_of(extra))) for extra in libraries if extra != FOR_DEVELOPERS
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _providers() -> tuple[tuple[str, ...], str | None]:
    """Execution providers, or why ONNX Runtime does not load."""
    try:
        import onnxruntime
    except Exception as e:  # a broken install fails in many ways, and all of them are reported
        return (), f"onnxruntime does not load ({e}): reinstall it"
    return tuple(onnxruntime.get_available_providers()), None
