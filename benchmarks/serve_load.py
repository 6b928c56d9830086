"""Clicks per second, latency and memory of `serve` with several users at a time.

    python benchmarks/serve_load.py demo/medsa_demo.medsa    → benchmarks/results/serve_load.json

Each user has an image and a lease of its own, and clicks at random places, each time as soon as
the mask of the click before has come. A click's latency ends when its slice's labels are there. A
sample of every user's masks is compared with `segment_volume` afterwards: a lost click or a mask of
another user's image ends the benchmark. Users and server share the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy import Session, Structure, load, segment_volume
from medsa_deploy.images import read_volume
from medsa_deploy.runtime import Embedding
from medsa_deploy.stages import diagnose

RESULT = Path(__file__).parent / "results" / "serve_load.json"
USERS = (1, 4, 16)
SECONDS = 120.0
SIDE = 256
CHECKED = 12
"""Masks of each user that are compared."""
TIMEOUT = 300.0
FRAME = struct.Struct("<II")


@dataclass(kw_only=True)
class User:
    """One user: an image, a connection, clicks with their latencies."""

    number: int
    port: int
    path: Path
    """The image, a .npy."""
    slices: int
    lease: str = ""
    latencies_ms: list[float] = field(default_factory=list)
    answers: list[tuple[tuple[int, int, int], bytes]] = field(default_factory=list)
    """Clicks, and the runs of their slice's labels."""
    refused: int = 0
    """Answers with status 503, after which the user waited and clicked again."""
    error: str | None = None

    def __post_init__(self) -> None:
        self.connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """An answer as JSON."""
        self.connection.request(method, path, body, {"X-Lease-Token": self.lease})
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
        return json.loads(content)

    def begin(self) -> None:
        """Connect, send the image and click once, so that it is encoded."""
        self.lease = self.ask("POST", "/api/lease")["lease"]
        self.ask("PUT", "/api/files/image.npy", self.path.read_bytes())
        self.ask("POST", "/api/image", b"{}")
        self.click((SIDE // 2, SIDE // 2, self.slices // 2))
        self.connection.close()  # the server closes one that rests; the next click opens it again

    def click(self, place: tuple[int, int, int]) -> bytes:
        """The runs of a click's slice; its latency is noted."""
        k, r, c = place[2], place[1], place[0]
        prompts = {"structures": [{"points": [[k, r, c]]}], "near": k}
        while True:
            start = time.perf_counter()
            headers = {"X-Lease-Token": self.lease}
            self.connection.request("POST", "/api/masks", json.dumps(prompts), headers)
            answer = self.connection.getresponse()
            if answer.status == 503:
                answer.read()
                self.refused += 1
                self.connection.close()
                time.sleep(float(answer.getheader("Retry-After", "1")))
                continue
            if answer.status != 200:
                raise RuntimeError(f"a click: {answer.status} {answer.read()[:200]!r}")
            return self._slice(answer, k, start)

    def _slice(self, answer: io.BufferedIOBase, index: int, start: float) -> bytes:
        """The labels of a slice, out of all frames of an answer."""
        labels, kind = None, None
        while header := answer.read(FRAME.size):
            text, length = FRAME.unpack(header)
            facts, content = json.loads(answer.read(text)), answer.read(length)
            kind = facts["kind"]
            if kind == "error":
                raise RuntimeError(facts["detail"])
            if kind == "labels" and facts["slice"] == index and labels is None:
                self.latencies_ms.append(1e3 * (time.perf_counter() - start))
                labels = content
        if labels is None or kind != "end":
            raise RuntimeError("an answer without its mask")
        return labels

    def work(self, until: float) -> None:
        """Click until a time."""
        rng = random.Random(self.number)
        try:
            while time.monotonic() < until:
                place = (rng.randrange(SIDE), rng.randrange(SIDE), self.slices // 2)
                self.answers.append((place, self.click(place)))
        except (RuntimeError, OSError, HTTPException, ValueError) as e:
            self.error = f"user {self.number}: {e}"


def resident_mb(process: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def image(folder: Path, number: int, slices: int) -> Path:
    """A user's image: an ellipse at a place of its own, in noise."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    r, c = rng.uniform(0.3, 0.7, 2) * SIDE
    inside = ((rows - r) / 60) ** 2 + ((columns - c) / 40) ** 2 < 1
    values = rng.normal(80, 20, (slices, SIDE, SIDE)) + 90 * inside
    path = folder / f"user{number}.npy"
    np.save(path, np.clip(values, 0, 255).astype(np.uint8))
    return path


def expand(content: bytes) -> np.ndarray:
    """Runs → labels (SIDE, SIDE)."""
    words = np.frombuffer(content, "<u4")
    return np.repeat((words >> 24).astype(np.uint8), words & 0xFFFFFF).reshape(SIDE, SIDE)


class EncodedOnce(Session):
    """A session that encodes the same slices once, to check many clicks on them."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.manifest, session.backend)
        self.embeddings: dict[bytes, list[Embedding]] = {}

    def encode_slices(self, slices: Sequence[Any], **options: Any) -> list[Embedding]:
        """As `Session.encode_slices`."""
        key = b"".join(plane.pixels.tobytes() for plane in slices)
        if key not in self.embeddings:
            self.embeddings[key] = super().encode_slices(slices, **options)
        return self.embeddings[key]


def check(session: Session, users: list[User]) -> int:
    """Compare a sample of every user's masks with `segment_volume`; the number compared."""
    compared = 0
    for user in users:
        volume, encoded = read_volume(user.path), EncodedOnce(session)
        rng = random.Random(user.number)
        for place, content in rng.sample(user.answers, min(CHECKED, len(user.answers))):
            structure = Structure(points=((place[2], place[1], place[0]),), labels=(1,))
            labels = segment_volume(encoded, volume, [structure]).labels
            if not np.array_equal(volume.plane(labels, place[2]), expand(content)):
                raise SystemExit(f"user {user.number}: the mask of the click {place} is wrong")
            compared += 1
    return compared


def measure(bundle: Path, session: Session, count: int, seconds: float) -> dict[str, Any]:
    """One case, with a server of its own."""
    slices = session.manifest.network.chunk
    command = [sys.executable, "-m", "medsa_deploy.cli", "serve", str(bundle.resolve())]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            users = [
                User(number=n, port=port, path=image(Path(folder), n, slices), slices=slices)
                for n in range(count)
            ]
            for user in users:
                user.begin()
                user.latencies_ms.clear()
            before = cpu_seconds(server.pid)
            memory = run(users, seconds, server.pid)
            cpu = cpu_seconds(server.pid) - before
        finally:
            server.terminate()
            server.wait()
        errors = [user.error for user in users if user.error is not None]
        if errors:
            raise SystemExit("\n".join(errors))
        compared = check(session, users)
    latencies = np.concatenate([user.latencies_ms for user in users])
    p50, p95, p99 = (round(float(np.percentile(latencies, p)), 1) for p in (50, 95, 99))
    return {
        "users": count,
        "seconds": seconds,
        "clicks": len(latencies),
        "clicks_per_second": round(len(latencies) / seconds, 2),
        "fewest_clicks_of_a_user": min(len(user.latencies_ms) for user in users),
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99, "most": round(latencies.max(), 1)},
        "server_cpu_ms_a_click": round(1e3 * cpu / len(latencies), 1),
        "refused": sum(user.refused for user in users),
        "masks_compared": compared,
        "memory_mb": memory,
    }


def run(users: list[User], seconds: float, process: int) -> dict[str, float]:
    """All users click; the server's memory at the start, after a quarter, at the end, at most."""
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=user.work, args=(until,)) for user in users]
    memory = [resident_mb(process)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(1.0, seconds / 8))
        memory.append(resident_mb(process))
    return {
        "start": memory[0],
        "quarter": memory[len(memory) // 4],
        "end": memory[-1],
        "most": max(memory),
    }


def main() -> None:
    """Measure all cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    machine, cases, loads = diagnose(), [], []
    with load(options.bundle) as session:
        for count in options.users:
            cases.append(measure(options.bundle, session, count, options.seconds))
            loads.append(round(os.getloadavg()[0], 1))
            print(json.dumps(cases[-1]), flush=True)
    result = {
        "what": f"serve with {options.bundle.name} on loopback; users click without a pause and "
        "share the machine with the server",
        "bundle": options.bundle.name,
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "versions": {name: version(name) for name in ("onnxruntime", "starlette", "uvicorn")},
        "load_after_each_case": loads,
        "cases": cases,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
