"""Sessions in process, `serve` and Triton under load → rates, service times, loads beside a model.

    python -m benchmarks.capacity_load ckpt.medsa --launcher ./start.sh

→ benchmarks/results/capacity.json. `start.sh REPOSITORY PORT` becomes tritonserver: HTTP on PORT,
gRPC on PORT + 1. Loads are random: each scanner's clicks and images come whether or not the ones
before have been answered, and a click's time begins when it should have been sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.capacity import (
    RESULT,
    Demand,
    ServiceTimes,
    click_quantile_s,
    service_times,
    simulate,
    utilization,
)
from medsa_deploy import load, remote
from medsa_deploy.runtime import Embedding
from medsa_deploy.serve.array_wire import pack
from medsa_deploy.stages import diagnose
from medsa_deploy.triton.embedding_store import embedding_bytes
from medsa_deploy.triton.models import RepositoryOptions
from medsa_deploy.triton.repository import write_repository

SIDE = 256
CLICKS, ENCODES = 60, 12
"""Samples of one calibration."""
LOADS = (0.25, 0.45, 0.6)
"""Utilizations that are played."""
CLICKS_PER_IMAGE = 10.0
SCANNERS = 6
MEMORY_IMAGES = 60


def image(seed: int) -> np.ndarray:
    """(SIDE, SIDE) uint8: a bright box in noise."""
    plane = np.random.default_rng(seed).integers(0, 60, (SIDE, SIDE), np.uint8)
    plane[60:180, 70:190] += 120
    return plane


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's value and its milliseconds."""
    start = time.perf_counter()
    value = call()
    return value, 1e3 * (time.perf_counter() - start)


def calibrate(session: Any) -> dict[str, list[float]]:
    """Milliseconds of encodes and clicks, one after another."""
    samples: dict[str, list[float]] = {"click_ms": [], "encode_ms": []}
    for i in range(ENCODES):
        embedding, spent = timed(lambda i=i: session.encode(image(i)))
        samples["encode_ms"].append(spent)
        for k in range(CLICKS // ENCODES):
            click = [(80 + 5 * k, 90)]
            spent = timed(lambda e=embedding, c=click: session.segment(e, points=c))[1]
            samples["click_ms"].append(spent)
    return {name: values[1:] for name, values in samples.items()}  # the first warms up


def calibrate_together(url: str, name: str, users: int) -> dict[str, list[float]]:
    """Samples of users that all work at once, so that instances compete for cores as they will."""
    barrier = threading.Barrier(users)

    def use(_: int) -> dict[str, list[float]]:
        with remote.connect(url, name) as session:
            barrier.wait(120)
            return calibrate(session)

    with ThreadPoolExecutor(users) as pool:
        return joined(list(pool.map(use, range(users))))


def joined(samples: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Samples of several calibrations as one."""
    return {kind: [ms for part in samples for ms in part[kind]] for kind in samples[0]}


def saturated(open_session: Callable[[], Any], users: int, seconds: float) -> dict[str, float]:
    """Clicks a second, and encodes a minute, of users that never wait."""
    return {
        "clicks_per_s": rate(open_session, users, seconds, clicks=True),
        "encodes_per_minute": 60 * rate(open_session, users, seconds, clicks=False),
    }


def rate(open_session: Callable[[], Any], users: int, seconds: float, *, clicks: bool) -> float:
    """Clicks, or encodes, a second."""
    counts, stop, barrier = [0] * users, threading.Event(), threading.Barrier(users + 1)

    def use(i: int) -> None:
        with contextlib.closing(open_session()) as session:
            embedding = session.encode(image(i))
            barrier.wait(120)
            while not stop.is_set():
                if clicks:
                    session.segment(embedding, points=[(100, 90)])
                else:
                    embedding = session.encode(image(i))
                counts[i] += 1

    threads = [threading.Thread(target=use, args=(i,)) for i in range(users)]
    for thread in threads:
        thread.start()
    barrier.wait(120)
    start = time.perf_counter()
    time.sleep(seconds)
    done, spent = sum(counts), time.perf_counter() - start
    stop.set()
    for thread in threads:
        thread.join()
    return done / spent


class ServeUser:
    """`serve` with a session's two methods, over nnInteractive's protocol."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        token = self._client.post("/claim").json()["lease_token"]
        self._client.headers["X-Lease-Token"] = token

    def encode(self, plane: np.ndarray) -> None:
        """Send an image and click once, which encodes it."""
        self._post("/set_image", content=pack(plane[None, None].astype(np.int16)))
        self.segment(None, points=[(100, 90)])

    def segment(self, embedding: Embedding | None, *, points: list[tuple[int, int]]) -> None:
        """Forget the clicks, then click."""
        self._post("/reset_interactions")
        (x, y) = points[0]
        click = {"coordinates": [0, y, x], "include_interaction": True}
        self._post("/add_point_interaction", json=click)

    def close(self) -> None:
        """End the lease."""
        self._post("/release")
        self._client.close()

    def _post(self, path: str, **options: Any) -> None:
        self._client.post(path, **options).raise_for_status()


class SharedSession:
    """A session that its users do not close."""

    def __init__(self, session: Any) -> None:
        self.encode, self.segment = session.encode, session.segment

    def close(self) -> None:
        """The session stays open."""


@contextlib.contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """`medsa-deploy serve` as a process; its address."""
    command = [sys.executable, "-m", "medsa_deploy.cli", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        document = "".join(iter(process.stdout.readline, "}\n")) + "}"
        yield json.loads(document)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextlib.contextmanager
def triton(bundle: Path, launcher: Path, port: int, instances: int) -> Iterator[str]:
    """A server with so many instances of NAME_session alone; its gRPC address."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        write_repository([bundle], models, RepositoryOptions(instances=instances))
        for model in models.glob("*_*"):
            if not model.name.endswith("_session"):
                model.rename(Path(folder) / model.name)
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(
                [launcher, models, str(port)], stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait(f"http://127.0.0.1:{port}/v2/health/ready", process)
            yield f"grpc://127.0.0.1:{port + 1}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the launcher ended before the server was ready")


def stub_mb() -> float:
    """Resident memory of the instances of session models, in MB."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"triton_python_backend_stub") and b"_session/" in words[1]:
                pages = int((path.parent / "statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
    return total / 1e6


def play(url: str, name: str, demand: Demand, seconds: float, seed: int) -> dict[str, Any]:
    """Scanners with random clicks and images; milliseconds from when each should have started."""
    rng = np.random.default_rng(seed)
    clicks, images = demand.rates(1)
    events = []
    moment = 0.0
    while moment < seconds:
        moment += rng.exponential(1 / (clicks + images))
        kind = "click" if rng.random() < clicks / (clicks + images) else "image"
        events.append((moment, kind, int(rng.integers(demand.scanners))))
    spent: dict[str, list[float]] = {"click": [], "image": []}
    server: dict[str, list[float]] = {"click": [], "image": []}
    with remote.connect(url, name, timeout_s=120) as session, ThreadPoolExecutor(64) as pool:
        newest = {i: session.encode(image(i)) for i in range(demand.scanners)}
        begin = time.perf_counter()

        def act(moment: float, kind: str, scanner: int) -> None:
            if kind == "click":
                timings = session.segment(newest[scanner], points=[(100, 90)]).timings_ms
                server[kind].append(timings["decode"] + timings["postprocess"])
            else:
                newest[scanner] = session.encode(image(scanner))
                timings = newest[scanner].timings_ms
                server[kind].append(timings["preprocess"] + timings["encode"])
            spent[kind].append(1e3 * (time.perf_counter() - begin - moment))

        calls = []
        for event in events:
            time.sleep(max(0.0, begin + event[0] - time.perf_counter()))
            calls.append(pool.submit(act, *event))
        for call in calls:
            call.result()
    return {"click_ms": spent["click"], "image_ms": spent["image"], "server_ms": server}


def compare(
    played: dict[str, Any], service: ServiceTimes, demand: Demand, instances: int
) -> dict[str, Any]:
    """A load beside the model: with the calibration's service times, and with the load's own."""
    measured = float(np.quantile(played["click_ms"], 0.95))
    server = played["server_ms"]
    # what a request costs around the network's runs, as the calibration saw it
    around_s = max(0.0, np.median(service.clicks_s) - np.median(server["click"]) / 1e3)
    same_run = ServiceTimes(
        clicks_s=tuple(ms / 1e3 + min(around_s, 0.01) for ms in server["click"]),
        encodes_s=tuple(ms / 1e3 + min(around_s, 0.01) for ms in server["image"]),
        instance_mb=service.instance_mb,
        image_mb=service.image_mb,
    )
    compared: dict[str, Any] = {
        "instances": instances,
        "scanners": demand.scanners,
        "clicks_per_minute": demand.clicks_per_minute,
        "images_per_minute": demand.images_per_minute,
        "clicks": len(played["click_ms"]),
        "measured_p50_ms": float(np.median(played["click_ms"])),
        "measured_p95_ms": measured,
        "click_ms": [round(ms, 2) for ms in played["click_ms"]],
    }
    for kind, times in (("calibration", service), ("same_run", same_run)):
        predicted = 1e3 * click_quantile_s(times, demand, instances)
        simulated = simulate(times, demand, instances, requests=40_000, seed=1)
        compared[kind] = {
            "utilization": utilization(times, demand, instances),
            "predicted_p95_ms": predicted if np.isfinite(predicted) else None,
            "simulated_p95_ms": 1e3 * float(np.quantile(simulated, 0.95)),
            "measured_over_predicted": measured / predicted,
        }
    return compared


def measure(bundle: Path, launcher: Path, port: int, seconds: float) -> dict[str, Any]:
    """Everything that the result holds."""
    result: dict[str, Any] = {"saturated": [], "calibrations": [], "loads": []}
    with load(bundle) as session:
        result["calibrations"].append({"instances": 0, **calibrate(session)})
        result["memory"] = {"image_mb": embedding_bytes(session.encode(image(0))) / 1e6}
        rates = saturated(lambda: SharedSession(session), 2, seconds / 4)
        result["saturated"].append({"kind": "in process", "users": 2, **rates})
    with serving(bundle) as url:
        rates = saturated(lambda: ServeUser(url), 2, seconds / 4)
        result["saturated"].append({"kind": "serve", "users": 2, **rates})
    name = bundle.resolve().stem
    for instances in (1, 2):
        with triton(bundle, launcher, port, instances) as url:
            if instances == 1:
                result["memory"] |= image_memory(url, name)
            calibration = calibrate_together(url, name, instances)
            result["calibrations"].append({"instances": instances, **calibration})
            rates = saturated(lambda u=url: remote.connect(u, name), 2, seconds / 4)
            kind = f"Triton, {instances} instance{'s' * (instances > 1)}"
            result["saturated"].append({"kind": kind, "users": 2, **rates})
            for load_share in LOADS:
                compared = loaded(url, name, instances, load_share, seconds, result)
                result["loads"].append(compared)
                print(json.dumps({k: v for k, v in compared.items() if k != "click_ms"}))
    return result


def image_memory(url: str, name: str) -> dict[str, float]:
    """Resident MB of an instance, and of each of MEMORY_IMAGES images that it keeps."""
    with remote.connect(url, name) as session:
        session.segment(session.encode(image(0)), points=[(100, 90)])
        empty = stub_mb()
        kept_images = [session.encode(image(i)) for i in range(MEMORY_IMAGES)]
        return {
            "instance_mb": empty,
            "image_resident_mb": (stub_mb() - empty) / len(kept_images),
        }


def loaded(
    url: str, name: str, instances: int, load_share: float, seconds: float, result: dict[str, Any]
) -> dict[str, Any]:
    """A load between two calibrations, which a shared machine needs, beside the model of both."""

    def service(samples: dict[str, list[float]]) -> ServiceTimes:
        calibration = {"instances": instances, **samples}
        return service_times(result | {"calibrations": [calibration]}, instances)

    before = calibrate_together(url, name, instances)
    demand = demand_for(service(before), instances, load_share)
    played = play(url, name, demand, seconds, seed=instances)
    after = calibrate_together(url, name, instances)
    return compare(played, service(joined([before, after])), demand, instances)


def demand_for(service: ServiceTimes, instances: int, load_share: float) -> Demand:
    """SCANNERS whose clicks and images keep the instances busy for a share of the time."""
    unit = Demand(scanners=SCANNERS, clicks_per_minute=CLICKS_PER_IMAGE, images_per_minute=1)
    factor = load_share / utilization(service, unit, instances)
    return Demand(
        scanners=SCANNERS,
        clicks_per_minute=CLICKS_PER_IMAGE * factor,
        images_per_minute=factor,
    )


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--launcher", type=Path, required=True)
    parser.add_argument("--port", type=int, default=18200)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    machine, load_before = diagnose(), os.getloadavg()[0]
    result = {
        "what": "a small 2D bundle at 256×256; clients and servers share the machine",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "versions": {name: version(name) for name in ("onnxruntime", "tritonclient")},
        "load": [round(load_before, 1)],
    } | measure(options.bundle, options.launcher, options.port, options.seconds)
    result["load"] += [round(os.getloadavg()[0], 1)]
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
