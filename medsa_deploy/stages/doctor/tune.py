"""A bundle → the backend and threads that answer its first click soonest on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

from medsa_deploy import machine
from medsa_deploy.bundle.checked import check_changeable
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.evaluation.latency_worker import Work, run_once, seeded_work
from medsa_deploy.progress import OnStep
from medsa_deploy.runtime import load, tuning
from medsa_deploy.runtime.backends.registry import BackendName
from medsa_deploy.runtime.tuning import TUNABLE, Choice

ROUNDS = 3
"""How often every candidate has its turn, so that a busy moment falls on more than one."""
SECONDS = 1.0
"""Length of a turn: at least one run, after one that is not counted."""
MARGIN = 0.95
"""A candidate replaces the default only if it takes less than this share of the default's time."""

Setting = tuple[BackendName, int | None]
"""A backend and its number of threads."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A backend with a number of threads, measured."""

    backend: BackendName
    threads: int | None
    """None for all cores, as the backend counts them."""
    first_click_ms: float
    """Median."""
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The measured latencies, and the choice that was stored."""

    choice: Choice
    candidates: tuple[Candidate, ...]
    stored_in: Path


def tune(bundle: Path, *, on_step: OnStep = lambda step: None) -> Tuning:
    """Measure the backends installed here, and store the fastest for `backend="auto"`.

    All of them run float32, so the masks are the same. The candidates take turns, one in memory at
    a time.
    """
    check_changeable(bundle)
    manifest = load_manifest(bundle)
    work = seeded_work(manifest)
    settings = _settings()
    samples: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for turn in range(ROUNDS):
        for backend, threads in settings:
            on_step(f"round {turn + 1} of {ROUNDS}: {backend}, {threads or 'all'} thread(s)")
            samples[backend, threads] += _turn(bundle, work, backend, threads)
    candidates = tuple(
        Candidate(backend=b, threads=t, first_click_ms=median(ms), samples_ms=tuple(ms))
        for (b, t), ms in samples.items()
    )
    best = fastest(candidates)
    choice = Choice(
        encoder_sha256=manifest.file("encoder").sha256,
        bundle=bundle.resolve().name,
        machine=tuning.this_machine(),
        backend=best.backend,
        threads=best.threads,
        first_click_ms=best.first_click_ms,
        measured=date.today().isoformat(),
    )
    return Tuning(choice=choice, candidates=candidates, stored_in=tuning.store(choice))


def fastest(candidates: tuple[Candidate, ...]) -> Candidate:
    """The default, which comes first, unless another is clearly faster."""
    default = candidates[0]
    best = min(candidates, key=lambda candidate: candidate.first_click_ms)
    return best if best.first_click_ms < MARGIN * default.first_click_ms else default


def _settings() -> list[Setting]:
    """Backends and threads to try; the default first."""
    installed = [backend for backend in TUNABLE if find_spec(backend) is not None]
    fewer = dict.fromkeys(machine.cores() // part for part in (2, 4))
    threads = [None, *(count for count in fewer if count)]
    return [(backend, count) for backend in installed for count in threads]


def _turn(bundle: Path, work: Work, backend: BackendName, threads: int | None) -> list[float]:
    """Milliseconds of first clicks."""
    samples_ms: list[float] = []
    with load(bundle, backend=backend, threads=threads) as session:
        run_once(session, work)
        start = perf_counter()
        while not samples_ms or perf_counter() - start < SECONDS:
            samples_ms.append(run_once(session, work)["first click"])
    return samples_ms
