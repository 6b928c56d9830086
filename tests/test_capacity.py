"""The model of a server's queue, against exact formulas and a simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.capacity import (
    Demand,
    ServiceTimes,
    click_quantile_s,
    plan,
    simulate,
    utilization,
)

RNG = np.random.default_rng(7)
SERVICE = ServiceTimes(
    clicks_s=tuple(RNG.gamma(20, 0.03 / 20, 400)),
    encodes_s=tuple(RNG.gamma(30, 0.15 / 30, 200)),
    instance_mb=140.0,
    image_mb=1.3,
)


def demand_of(load: float, *, clicks_per_image: float = 10) -> Demand:
    """Scanners that keep one instance busy for this share of the time."""
    unit = Demand(scanners=1, clicks_per_minute=clicks_per_image, images_per_minute=1)
    factor = load / utilization(SERVICE, unit, 1)
    return Demand(scanners=1, clicks_per_minute=clicks_per_image * factor, images_per_minute=factor)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.7, 0.85])
def test_the_model_agrees_with_a_simulation(load: float) -> None:
    times = simulate(SERVICE, demand_of(load), 1, requests=120_000, seed=3)
    expected = np.quantile(times, 0.95)
    assert click_quantile_s(SERVICE, demand_of(load), 1) == pytest.approx(expected, rel=0.15)


def test_exponential_service_is_exact() -> None:
    """M/M/1: the time in the system is exponential with the rate μ − λ."""
    mean, load = 0.02, 0.6
    quantiles = (np.arange(4000) + 0.5) / 4000
    times = tuple(-mean * np.log1p(-quantiles))
    service = replace(SERVICE, clicks_s=times, encodes_s=(mean,))
    demand = Demand(scanners=1, clicks_per_minute=60 * load / mean, images_per_minute=0)
    exact = -math.log(0.05) / (1 / mean - load / mean)
    assert click_quantile_s(service, demand, 1) == pytest.approx(exact, rel=0.02)
    simulated = np.quantile(simulate(service, demand, 1, requests=150_000, seed=5), 0.95)
    assert simulated == pytest.approx(exact, rel=0.06)


def test_too_much_work_never_ends() -> None:
    assert click_quantile_s(SERVICE, demand_of(1.01), 1) == math.inf
    assert click_quantile_s(SERVICE, demand_of(1.01), 2) < 1


def test_without_waiting_a_click_takes_its_own_time() -> None:
    idle = Demand(scanners=0, clicks_per_minute=10, images_per_minute=1)
    assert click_quantile_s(SERVICE, idle, 1) == np.quantile(SERVICE.clicks_s, 0.95)


@pytest.mark.parametrize("scanners", [4, 40, 160])
def test_a_plan_is_the_smallest_that_holds(scanners: int) -> None:
    demand = Demand(scanners=scanners, clicks_per_minute=20, images_per_minute=2)
    chosen = plan(SERVICE, demand, limit_s=0.2)
    assert chosen is not None
    assert chosen.p95_click_ms <= 200
    assert chosen.memory_mb == pytest.approx(140 * chosen.instances + 1.3 * scanners)
    if chosen.instances > 1:
        assert click_quantile_s(SERVICE, demand, chosen.instances - 1) > 0.2
    times = simulate(SERVICE, demand, chosen.instances, requests=60_000, seed=1)
    assert np.quantile(times, 0.95) < 0.2 * 1.15


def test_no_number_of_instances_makes_a_click_faster() -> None:
    demand = Demand(scanners=1, clicks_per_minute=1, images_per_minute=1)
    assert plan(SERVICE, demand, limit_s=0.001) is None
