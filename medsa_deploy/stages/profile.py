"""A bundle → how long everything takes here, measured in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy import __version__, errors, machine
from medsa_deploy.bundle.manifest import Manifest, load_manifest
from medsa_deploy.errors import DeviceError, InputError, UsageError
from medsa_deploy.evaluation import latency
from medsa_deploy.evaluation.latency import Profile
from medsa_deploy.evaluation.latency_worker import STAGES, WARM_UP, LatencyOptions
from medsa_deploy.images.files import check_writable, output_file
from medsa_deploy.progress import OnCount, OnStep
from medsa_deploy.reports.latency import profile_page
from medsa_deploy.runtime.loading import RUN, check_options, files_precision

logger = logging.getLogger(__name__)

SHARED = ("preprocess", "encode")
"""Stages that are of all slices of a chunk together."""
KILLED = -9
LONGEST_MS = 1e9
"""Samples beyond it (11 days) are no samples."""


@dataclass(frozen=True, kw_only=True)
class ProfileTargets:
    """What a profile is compared with, and where it goes."""

    other: Path | None = None
    """The JSON of an earlier profile."""
    max_slowdown: float = 1.1
    """How many times as long a click may take as there."""
    json: Path | None = None
    html: Path | None = None


def profile_bundle(
    bundle: Path,
    options: LatencyOptions,
    outputs: ProfileTargets,
    *,
    on_step: OnStep = lambda step: None,
    on_run: OnCount = lambda done, of: None,
) -> Profile:
    """Measure a bundle, compare with an earlier profile, write JSON and a page.

    What cannot be used is refused before anything is measured.
    """
    made = _check(bundle, options, outputs)
    earlier = None if outputs.other is None else read_profile(outputs.other)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = measured(options, on_step, on_run)
    profile = _profile(bundle, made, options, found, load)
    if earlier is not None and outputs.other is not None:
        compared = latency.compare(profile, earlier, outputs.other.name, outputs.max_slowdown)
        profile = replace(profile, comparison=compared)
    for path, text in ((outputs.json, to_json(profile)), (outputs.html, profile_page(profile))):
        if path is not None:
            with output_file(path) as temporary:
                # names of files need not be UTF-8; as an escape they are at least JSON
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return profile


def to_json(profile: Profile) -> str:
    """The document that `read_profile` takes."""
    return json.dumps(asdict(profile), indent=1, ensure_ascii=False) + "\n"


def read_profile(path: Path) -> dict[str, Any]:
    """An earlier profile's JSON; InputError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({e}): give a profile, made with -o") from e
    if not isinstance(found, dict) or found.get("what") != "medsa-deploy profile":
        raise InputError(f"{path} is not a profile: make one with medsa-deploy profile … -o FILE")
    if found.get("schema") != latency.SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema {found.get('schema')!r}; this medsa-deploy reads "
            f"{latency.SCHEMA_VERSION}: measure again"
        )
    stages = found.get("stages")
    for stage in STAGES:
        if not (isinstance(stages, dict) and _has_samples(stages.get(stage))):
            raise InputError(f"{path} has no samples of the stage {stage!r}: measure again")
    return found


def measured(options: LatencyOptions, on_step: OnStep, on_run: OnCount) -> dict[str, Any]:
    """What `timing.measure` finds in a process of its own; its errors are raised here.

    The process is out of reach of the terminal's Ctrl-C, and is killed together with its temporary
    files instead.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "medsa_deploy.evaluation.latency_worker",
        json.dumps(asdict(options)),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="medsa-") as scratch,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "TMPDIR": scratch},
            start_new_session=True,
        ) as process,  # waits, and closes the pipe
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "result" in said:
                    result: dict[str, Any] = said["result"]
                    return result
                _pass_on(said, on_step, on_run)
        except BaseException:
            process.kill()
            raise
    raise DeviceError(_ended(process.returncode))


def _pass_on(said: Mapping[str, Any], on_step: OnStep, on_run: OnCount) -> None:
    """A line of the measuring process, to whom it is for; its errors are raised."""
    match said:
        case {"error": message, "kind": kind}:
            cls = getattr(errors, kind)  # some have constructors of their own
            raise cls.__new__(cls, message)
        case {"fault": what, "traceback": lines}:
            fault = RuntimeError(what)
            fault.add_note(lines)
            raise fault
        case {"warning": message}:
            logger.warning(message)
        case {"done": done, "of": of}:
            on_run(done, of)
        case {"step": step}:
            on_step(step)


def _ended(code: int) -> str:
    """Why there is no result."""
    if code == KILLED:
        return "the measuring process was killed, most often for lack of memory"
    return f"the measuring process ended early, with status {code}"


def _check(bundle: Path, options: LatencyOptions, outputs: ProfileTargets) -> Manifest:
    """The bundle's manifest; UsageError or BundleError for what cannot be measured."""
    made = load_manifest(bundle)
    check_options(options.backend, options.threads, options.precision)
    if options.runs < 1:
        raise UsageError(f"--runs {options.runs}: expected 1 or more")
    if not (isfinite(outputs.max_slowdown) and outputs.max_slowdown > 0):
        raise UsageError(
            f"--max-slowdown {outputs.max_slowdown:g}: expected a number above 0, such as 1.1"
        )
    written = [path for path in (outputs.json, outputs.html) if path is not None]
    for path in written:
        check_writable(path)
        if path.exists() and bundle.resolve() in path.resolve().parents:
            raise UsageError(f"{path} is in the bundle, and would be lost: name another output")
    # a profile may take the place of the one it is compared with
    image = Path(options.image) if options.image else None
    for out, read in ((outputs.html, outputs.other), (outputs.html, image), (outputs.json, image)):
        if out is not None and read is not None and out.resolve() == read.resolve():
            raise UsageError(f"{out} is read, and cannot be written too: name another output")
    if len(written) > len({path.resolve() for path in written}):
        raise UsageError(f"{written[0]} cannot be both the profile and its page")
    made.file("encoder", files_precision(options.precision))
    return made


def _profile(
    bundle: Path,
    made: Manifest,
    options: LatencyOptions,
    found: Mapping[str, Any],
    load: float | None,
) -> Profile:
    """What was measured, in numbers. `load`: the load average before."""
    slices, facts = found["slices"], found["facts"]
    held = files_precision(options.precision)
    untimed = () if found["layers"] else (f"{facts['backend']} does not time its layers",)
    stages = {
        name: latency.distribution(samples, slices=slices if name in SHARED else 1)
        for name, samples in found["samples_ms"].items()
    }
    return Profile(
        bundle=bundle.resolve().name,
        encoder_sha256=made.file("encoder", held).sha256,
        files_sha256={
            file.path: file.sha256
            for file in made.files
            if file.role in RUN and file.precision == held
        },
        backend=facts["backend"],
        precision=options.precision,
        threads=threads if isinstance(threads := facts.get("threads"), int) else None,
        facts=facts,
        work=found["work"],
        slices=slices,
        warm_up=WARM_UP,
        machine={
            "processor": machine.processor(),
            "cores": machine.cores(),
            "memory_gb": machine.memory_gb(),
            "system": machine.system(),
            **({"gpu": facts["device"]} if "device" in facts else {}),
        },
        versions={
            "medsa-deploy": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            facts["backend"]: facts["version"],
        },
        measured=datetime.now().astimezone().isoformat(timespec="seconds"),
        load_ms=found["load_ms"],
        loaded_mb=found["loaded_mb"],
        peak_mb=found["peak_mb"],
        stages=stages,
        layers={name: latency.graph_layers(layers) for name, layers in found["layers"].items()},
        warnings=(*untimed, *latency.noise(stages, load=load, cores=machine.cores())),
    )


def _has_samples(stage: object) -> bool:
    """Whether a stage of a document has positive numbers for samples."""
    samples = stage.get("samples_ms") if isinstance(stage, dict) else None
    return (
        isinstance(samples, list)
        and len(samples) > 0
        and all(type(ms) in (int, float) and 0 < ms < LONGEST_MS for ms in samples)
    )
