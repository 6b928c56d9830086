"""A bundle → its latency on this machine, measured in a process of its own."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy import __version__, machine
from medsa_deploy.bundle.manifest import Manifest, load_manifest
from medsa_deploy.errors import InputError, UsageError
from medsa_deploy.evaluation import latency
from medsa_deploy.evaluation.latency import Profile
from medsa_deploy.evaluation.latency_worker import (
    STAGES,
    WARM_UP,
    LatencyOptions,
    measure_in_child,
)
from medsa_deploy.images.files import check_writable, output_file
from medsa_deploy.progress import OnCount, OnStep
from medsa_deploy.reports.latency import profile_page
from medsa_deploy.runtime.backends.registry import GRAPH_ROLES, check_options, files_precision

SHARED = ("preprocess", "encode")
"""Stages that run on all slices of a chunk together."""
LONGEST_MS = 1e9
"""Longer samples (11 days) are refused."""


@dataclass(frozen=True, kw_only=True)
class ProfileTargets:
    """The profile to compare with, and the files to write."""

    other: Path | None = None
    """The JSON of an earlier profile."""
    max_slowdown: float = 1.1
    """The most that a click may take, as a multiple of its time in the earlier profile."""
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
    """Measure a bundle, compare it with an earlier profile, write JSON and a page.

    Options and files are checked before anything is measured: UsageError, InputError or BundleError
    if they cannot be used.
    """
    manifest = _check(bundle, options, outputs)
    earlier = None if outputs.other is None else read_profile(outputs.other)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    measurement = measure_in_child(options, on_step, on_run)
    profile = _profile(bundle, manifest, options, measurement, load)
    if earlier is not None and outputs.other is not None:
        comparison = latency.compare(profile, earlier, outputs.other.name, outputs.max_slowdown)
        profile = replace(profile, comparison=comparison)
    for path, text in ((outputs.json, to_json(profile)), (outputs.html, profile_page(profile))):
        if path is not None:
            with output_file(path) as temporary:
                # file names need not be UTF-8: escapes keep the document valid JSON
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return profile


def to_json(profile: Profile) -> str:
    """The document that `read_profile` reads."""
    return json.dumps(asdict(profile), indent=1, ensure_ascii=False) + "\n"


def read_profile(path: Path) -> dict[str, Any]:
    """An earlier profile's JSON; InputError if the file is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({e}): give a profile, made with -o") from e
    if not isinstance(document, dict) or document.get("what") != "medsa-deploy profile":
        raise InputError(f"{path} is not a profile: make one with medsa-deploy profile … -o FILE")
    if document.get("schema") != latency.SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema {document.get('schema')!r}; this medsa-deploy reads "
            f"{latency.SCHEMA_VERSION}: measure again"
        )
    stages = document.get("stages")
    for stage in STAGES:
        if not (isinstance(stages, dict) and _has_samples(stages.get(stage))):
            raise InputError(f"{path} has no samples of the stage {stage!r}: measure again")
    return document


def _check(bundle: Path, options: LatencyOptions, outputs: ProfileTargets) -> Manifest:
    """The bundle's manifest; UsageError or BundleError if it cannot be measured as asked."""
    manifest = load_manifest(bundle)
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
            raise UsageError(
                f"{path} is a file in the bundle and would be replaced: name another output"
            )
    # a profile may replace the one it is compared with
    image = Path(options.image) if options.image else None
    for out, read in ((outputs.html, outputs.other), (outputs.html, image), (outputs.json, image)):
        if out is not None and read is not None and out.resolve() == read.resolve():
            raise UsageError(
                f"{out} is an input of this profile and would be replaced: name another output"
            )
    if len(written) > len({path.resolve() for path in written}):
        raise UsageError(f"{written[0]} cannot be both the profile and its page")
    manifest.file("encoder", files_precision(options.precision))
    return manifest


def _profile(
    bundle: Path,
    manifest: Manifest,
    options: LatencyOptions,
    measurement: Mapping[str, Any],
    load: float | None,
) -> Profile:
    """Summarise a measurement. `load`: the load average before it."""
    slices, facts = measurement["slices"], measurement["facts"]
    precision = files_precision(options.precision)
    untimed = () if measurement["layers"] else (f"{facts['backend']} does not time its layers",)
    stages = {
        name: latency.distribution(samples, slices=slices if name in SHARED else 1)
        for name, samples in measurement["samples_ms"].items()
    }
    return Profile(
        bundle=bundle.resolve().name,
        encoder_sha256=manifest.file("encoder", precision).sha256,
        files_sha256={
            file.path: file.sha256
            for file in manifest.files
            if file.role in GRAPH_ROLES and file.precision == precision
        },
        backend=facts["backend"],
        precision=options.precision,
        threads=threads if isinstance(threads := facts.get("threads"), int) else None,
        facts=facts,
        work=measurement["work"],
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
        load_ms=measurement["load_ms"],
        loaded_mb=measurement["loaded_mb"],
        peak_mb=measurement["peak_mb"],
        stages=stages,
        layers={
            name: latency.graph_layers(layers) for name, layers in measurement["layers"].items()
        },
        warnings=(*untimed, *latency.noise(stages, load=load, cores=machine.cores())),
    )


def _has_samples(stage: object) -> bool:
    """Whether a stage of a document has samples, all of them positive numbers."""
    samples = stage.get("samples_ms") if isinstance(stage, dict) else None
    return (
        isinstance(samples, list)
        and len(samples) > 0
        and all(type(ms) in (int, float) and 0 < ms < LONGEST_MS for ms in samples)
    )
