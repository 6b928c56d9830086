"""Scanners, click and image rates → instances and memory of a Triton server that keep p95 low.

    python -m benchmarks.capacity plan --scanners 12 --clicks 10 --images 1 --limit-ms 300

The model is a queue: each instance of NAME_session computes one request at a time, in the order in
which clicks and images arrive (M/G/1, first come first served). Its service times are samples that
`benchmarks/capacity_load.py` measures, in `results/capacity.json`. `simulate` plays the same queue
event by event; the tests compare the two.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "capacity.json"
MOST_INSTANCES = 256
QUANTILE = 0.95
STEPS = 60
"""Halvings of the interval in which a quantile lies."""


@dataclass(frozen=True, kw_only=True)
class ServiceTimes:
    """What one instance needs for a request, measured."""

    clicks_s: tuple[float, ...]
    encodes_s: tuple[float, ...]
    instance_mb: float
    """Resident memory of an instance without an image."""
    image_mb: float
    """Memory of one open image."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What scanners ask for; each arrives at random."""

    scanners: int
    clicks_per_minute: float
    """Of one scanner."""
    images_per_minute: float
    """Of one scanner; it keeps its newest image open."""

    def rates(self, instances: int) -> tuple[float, float]:
        """Clicks and images a second that one of the instances gets."""
        share = self.scanners / instances / 60
        return self.clicks_per_minute * share, self.images_per_minute * share


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Instances for a demand, and what to expect of them."""

    instances: int
    p95_click_ms: float
    utilization: float
    memory_mb: float


def utilization(service: ServiceTimes, demand: Demand, instances: int) -> float:
    """Share of the time that an instance computes; 1 and more: it cannot keep up."""
    clicks, images = demand.rates(instances)
    return float(clicks * np.mean(service.clicks_s) + images * np.mean(service.encodes_s))


def click_quantile_s(
    service: ServiceTimes, demand: Demand, instances: int, quantile: float = QUANTILE
) -> float:
    """Seconds from a click to its mask that `quantile` of the clicks do not exceed.

    The mean wait is Pollaczek's and Khinchine's, λ E[S²] / 2(1 − ρ). A click waits with probability
    ρ, and the waits are taken as exponential, which the simulation checks.
    """
    clicks, images = demand.rates(instances)
    load = utilization(service, demand, instances)
    if load >= 1:
        return math.inf
    times = np.array(service.clicks_s)
    second = clicks * np.mean(times**2) + images * np.mean(np.square(service.encodes_s))
    wait = float(second) / (2 * (1 - load))  # λ E[S²] is a sum over both kinds
    if load == 0:
        return float(np.quantile(times, quantile))

    def exceeded(limit: float) -> float:
        """Probability that a click takes longer than `limit`."""
        room = limit - times
        tail = load * np.exp(-load * np.maximum(room, 0) / wait)
        return float(np.mean(np.where(room < 0, 1.0, tail)))

    low, high = 0.0, float(times.max()) + 50 * wait / load
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeded(middle) > 1 - quantile else (low, middle)
    return high


def simulate(
    service: ServiceTimes, demand: Demand, instances: int, *, requests: int, seed: int
) -> np.ndarray:
    """Seconds that each click took in a simulated queue of one instance; `requests` arrive."""
    rng = np.random.default_rng(seed)
    clicks, images = demand.rates(instances)
    is_click = rng.random(requests) < clicks / (clicks + images)
    gaps = rng.exponential(1 / (clicks + images), requests)
    times = np.where(
        is_click, rng.choice(service.clicks_s, requests), rng.choice(service.encodes_s, requests)
    )
    waits = np.zeros(requests)
    for i in range(1, requests):
        waits[i] = max(0.0, waits[i - 1] + times[i - 1] - gaps[i])
    return np.asarray((waits + times)[is_click])


def plan(service: ServiceTimes, demand: Demand, *, limit_s: float) -> Plan | None:
    """The fewest instances that keep 95 % of the clicks within `limit_s`; None if none do."""
    if np.quantile(service.clicks_s, QUANTILE) > limit_s:
        return None
    for instances in range(1, MOST_INSTANCES + 1):
        seconds = click_quantile_s(service, demand, instances)
        if seconds <= limit_s:
            return Plan(
                instances=instances,
                p95_click_ms=1e3 * seconds,
                utilization=utilization(service, demand, instances),
                memory_mb=instances * service.instance_mb + demand.scanners * service.image_mb,
            )
    return None


def service_times(result: dict[str, Any], instances: int) -> ServiceTimes:
    """The samples of a result, measured with so many instances."""
    (samples,) = (s for s in result["calibrations"] if s["instances"] == instances)
    memory = result["memory"]
    return ServiceTimes(
        clicks_s=tuple(ms / 1e3 for ms in samples["click_ms"]),
        encodes_s=tuple(ms / 1e3 for ms in samples["encode_ms"]),
        instance_mb=memory["instance_mb"],
        image_mb=memory["image_mb"],
    )


def main() -> None:
    """Print a plan as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("--scanners", type=int, required=True)
    planning.add_argument("--clicks", type=float, required=True, help="a minute, of one scanner")
    planning.add_argument("--images", type=float, required=True, help="a minute, of one scanner")
    planning.add_argument("--limit-ms", type=float, required=True)
    planning.add_argument("--instances-measured", type=int, default=2)
    planning.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    service = service_times(json.loads(options.result.read_text()), options.instances_measured)
    demand = Demand(
        scanners=options.scanners,
        clicks_per_minute=options.clicks,
        images_per_minute=options.images,
    )
    chosen = plan(service, demand, limit_s=options.limit_ms / 1e3)
    if chosen is None:
        raise SystemExit(
            f"no number of instances keeps 95 % of the clicks within {options.limit_ms:g} ms: a "
            f"click alone takes {1e3 * np.quantile(service.clicks_s, QUANTILE):.0f} ms"
        )
    print(json.dumps(asdict(chosen), indent=2))


if __name__ == "__main__":
    main()
