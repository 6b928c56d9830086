"""Candidates → samples: each in a process of its own, in turn, round by round."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from .candidates import Candidate
from .files import ROOT, say

PATIENCE_S = 900.0
"""For one answer; torch.compile takes minutes."""
PAUSE_S = 0.05
"""Before a request, for the threads of the candidate before to fall asleep."""
SAMPLE_MS = 300.0
"""Short operations are repeated for so long in a round."""
MOST_REPEATS = 10
MOST_TOGETHER = 7
"""Candidates in a group."""
GEMM = {"kind": "gemm"}


class WorkerError(Exception):
    """A worker did not answer, or said that it failed."""


class Worker:
    """A candidate's process."""

    def __init__(self, spec: Mapping[str, Any], log: Path) -> None:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker", json.dumps(spec)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, repeat: int = 1, prompts: int = 1) -> Any:
        """What it answers; WorkerError if it does not."""
        request = {"op": op, "repeat": repeat, "prompts": prompts}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as e:
            raise WorkerError(self._ended()) from e
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], PATIENCE_S)[0]:
            raise WorkerError(f"no answer within {PATIENCE_S:.0f} s")
        line = stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _ended(self) -> str:
        code = self._process.wait()
        return "killed, most often for lack of memory" if code == -9 else f"ended, status {code}"


@contextmanager
def worker(spec: Mapping[str, Any], log: Path) -> Iterator[Worker]:
    """A candidate's process, ended afterwards."""
    opened = Worker(spec, log)
    try:
        yield opened
    finally:
        opened.close()


@dataclass(kw_only=True)
class Running:
    """A candidate of a group."""

    candidate: Candidate
    process: Worker
    agreement: dict[str, Any]
    repeats: dict[str, int]
    prompts: int = 1
    """Sets that are decoded in one call."""
    samples_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    """Operation → round → runs."""

    def take(self) -> None:
        """A round."""
        for op in self.candidate.ops:
            time.sleep(PAUSE_S)
            milliseconds = self.process.ask(op, self.repeats[op], self.prompts)["ms"]
            self.samples_ms.setdefault(op, []).append(milliseconds)


def start(
    candidate: Candidate, process: Worker, repeats: int | None = None, prompts: int = 1
) -> Running:
    """Warm a candidate up. `repeats`: runs of a round, where it is not for their length to say."""
    agreement = process.ask("agree")
    counts = {}
    for op in candidate.ops:
        took = min(process.ask(op, 1, prompts)["ms"])
        counts[op] = repeats or max(1, min(MOST_REPEATS, math.ceil(SAMPLE_MS / took)))
    return Running(
        candidate=candidate, process=process, agreement=agreement, repeats=counts, prompts=prompts
    )


def available_gb() -> float:
    """Memory that is free for a further process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) / 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a network's candidates are measured."""

    rounds: int
    need_gb: float
    """Memory that has to be free for one candidate more."""
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Candidates that were measured together."""

    facts: dict[str, Any]
    figures: dict[str, Any]
    """Candidate → its figures, or the reason there are none."""
    unmeasured: list[Candidate]
    """Still to do."""


def measure(todo: Sequence[Candidate], reference: Candidate, limits: Limits, logs: Path) -> Group:
    """The first candidates of `todo`, as many as the memory takes, beside `reference`.

    WorkerError where that one fails; another's failure is the reason it has no figures.
    """
    group_figures: dict[str, Any] = {}
    unmeasured = [candidate for candidate in todo if candidate.name != reference.name]
    with ExitStack() as stack:
        gemm = stack.enter_context(worker(GEMM | {"threads": limits.threads}, logs / "gemm.log"))
        group = [_started(stack, reference, logs)]
        while unmeasured and len(group) < MOST_TOGETHER and available_gb() > limits.need_gb:
            candidate = unmeasured.pop(0)
            try:
                group.append(_started(stack, candidate, logs))
            except WorkerError as e:
                group_figures[candidate.name] = _failed(candidate, e)
        if unmeasured and not group_figures and len(group) == 1:
            reason = f"{available_gb():.1f} GB of memory free, {limits.need_gb:.1f} needed"
            group_figures[unmeasured.pop(0).name] = {"not_measured": reason}
        facts = {
            "reference": reference.name,
            "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
            "load_average": os.getloadavg()[0],
            "rounds": limits.rounds,
        }
        throughput: dict[str, list[float]] = {}
        for _ in range(limits.rounds):
            time.sleep(PAUSE_S)
            for library, value in gemm.ask("gemm")["gflops"].items():
                throughput.setdefault(library, []).append(value)
            _round(group, group_figures)
        facts["gemm_gflops"] = {name: median(values) for name, values in throughput.items()}
        facts["gemm_samples"] = throughput
        group_figures |= {run.candidate.name: figures(run, group[0]) for run in group}
    return Group(facts=facts, figures=group_figures, unmeasured=unmeasured)


def _round(group: list[Running], group_figures: dict[str, Any]) -> None:
    """One round of all; what fails leaves the group, which cannot be the first, the reference."""
    for running in list(group):
        try:
            running.take()
        except WorkerError as e:
            if running is group[0]:
                raise
            group_figures[running.candidate.name] = _failed(running.candidate, e)
            group.remove(running)


def _failed(candidate: Candidate, error: WorkerError) -> dict[str, str]:
    say(f"  {candidate.name}: {error}")
    return {"not_measured": str(error)}


def _started(stack: ExitStack, candidate: Candidate, logs: Path) -> Running:
    say(f"  {candidate.name}: load and warm up")
    name = "".join(c if c.isalnum() else "-" for c in candidate.name)
    return start(candidate, stack.enter_context(worker(candidate.spec, logs / f"{name}.log")))


def figures(running: Running, reference: Running) -> dict[str, Any]:
    """What was measured of one candidate."""
    return {
        "median_ms": {op: median(_flat(rounds)) for op, rounds in running.samples_ms.items()},
        "ratio": {
            op: ratio(running.samples_ms[op], reference.samples_ms[op])
            for op in running.samples_ms
            if op in reference.samples_ms
        },
        "peak_mb": running.process.ask("memory")["peak_mb"],
        "load_s": running.process.loaded["load_s"],
        "file_mb": sum(path.stat().st_size for path in running.candidate.files) / 1e6,
        "agreement": running.agreement,
        "versions": running.process.loaded["versions"],
        "samples_ms": running.samples_ms,
    }


def ratio(times: Sequence[Sequence[float]], reference_times: Sequence[Sequence[float]]) -> float:
    """Median over rounds of one candidate's time over another's in the same round."""
    return median(median(a) / median(b) for a, b in zip(times, reference_times, strict=True))


def _flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [sample for samples in rounds for sample in samples]
