"""Results of the batcher in simulated time, with noise of 7 % and hiccups: they do not depend on the machine that runs the test.

Three engines: segmentation (12 ms a row, nothing to gain by batches, objective 60 ms), a classifier (1 ms and 0.15 ms a row, objective
10 ms) and three sizes of pictures on one engine (objective 30 ms). Saturation is their throughput in full batches.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

STARTS = 3000
"""Requests at the beginning that do not count, for results of the steady state."""


@pytest.fixture(scope="module")
def scenarios(simulation: Any) -> dict[str, Any]:
    shape, scenario = simulation.Shape, simulation.Scenario
    sizes = (shape(fixed=0.001, each=each, share=share) for each, share in ((0.00015, 0.5), (0.0003, 0.3), (0.0006, 0.2)))
    return {
        "segmentation": scenario(shapes=(shape(fixed=0.0, each=0.012),), max_rows=4, objective=0.06, warm_up=STARTS),
        "classifier": scenario(shapes=(shape(fixed=0.001, each=0.00015),), max_rows=32, objective=0.01, warm_up=STARTS),
        "sizes": scenario(shapes=tuple(sizes), max_rows=16, objective=0.03, warm_up=STARTS),
    }


def at(scenario: Any, load: float, **changes: Any) -> Any:
    return replace(scenario, load=lambda now: load, **changes)


def best_refusal(*, service: float, objective: float, load: float, requests: int) -> float:
    """Share refused by a single first-come, first-served server that knows all times in advance: the plain reference for an engine that
    gains nothing by batches."""
    generator = random.Random(0)  # noqa: S311 - no secret
    now = free = 0.0
    refused = 0
    for _ in range(requests):
        now += generator.expovariate(load / service)
        took = service * math.exp(generator.gauss(0, 0.07))
        if max(free, now) + took > now + objective:
            refused += 1
        else:
            free = max(free, now) + took
    return refused / requests


@pytest.mark.parametrize(
    ("name", "requests", "refused"),
    [("segmentation", 6_000, 0.085), pytest.param("classifier", 60_000, 0.05, marks=pytest.mark.soak), ("sizes", 10_000, 0.01)],
)
def test_answers_in_time_at_90_percent_of_saturation(
    simulation: Any, scenarios: dict[str, Any], name: str, requests: int, refused: float
) -> None:
    summary = simulation.simulate(requests, seed=1, scenario=at(scenarios[name], 0.9))
    assert summary.inside >= 0.999
    assert summary.refusal < refused
    assert set(summary.refused) <= {"late"}


def test_refusals_compared_with_perfect_foresight(simulation: Any, scenarios: dict[str, Any]) -> None:
    """No policy refuses less than about 6.5 % of single requests at 90 % of saturation."""
    best = best_refusal(service=0.012, objective=0.06, load=0.9, requests=40_000)
    assert 0.06 < best < 0.07
    summary = simulation.simulate(6_000, seed=2, scenario=at(scenarios["segmentation"], 0.9))
    assert summary.refusal < best + 0.02


@pytest.mark.parametrize(
    ("name", "requests", "workers"),
    [
        ("segmentation", 5_000, 1), ("classifier", 30_000, 2),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("sizes", 30_000, 1), ("classifier", 30_000, 1), ("sizes", 30_000, 2))),
    ],
)  # fmt: skip
def test_goodput_at_three_times_saturation(simulation: Any, scenarios: dict[str, Any], name: str, requests: int, workers: int) -> None:
    summary = simulation.simulate(requests, seed=2, scenario=at(scenarios[name], 3.0, workers=workers))
    assert summary.goodput >= 0.9
    assert summary.inside > 0.985
    assert min(summary.by_shape) > 0.5 * max(summary.by_shape)  # no group crowds out the others


def test_overload_from_the_first_request(simulation: Any, scenarios: dict[str, Any]) -> None:
    """Nothing is learned yet."""
    for name in ("classifier", "sizes"):
        summary = simulation.simulate(20_000, seed=3, scenario=at(scenarios[name], 3.0, warm_up=0))
        assert summary.goodput > 0.85
        assert summary.inside > 0.97


def test_overload_with_pauses(simulation: Any, scenarios: dict[str, Any]) -> None:
    scenario = replace(scenarios["classifier"], load=lambda now: 0.2 if now % 2 < 1 else 3.0, warm_up=0)
    summary = simulation.simulate(30_000, seed=2, scenario=scenario)
    assert summary.inside > 0.99
    assert summary.goodput > 0.9 * (0.2 + 1.0) / 2 * 0.9


def test_large_batches_for_a_large_fixed_part(simulation: Any) -> None:
    shape = simulation.Shape(fixed=0.010, each=0.0001)
    scenario = simulation.Scenario(shapes=(shape,), max_rows=32, objective=0.05, warm_up=STARTS)
    summary = simulation.simulate(6_000, seed=0, scenario=at(scenario, 0.8))
    assert summary.batch_rows > 24
    assert summary.refusal < 0.001
    assert summary.inside > 0.999


def test_latency_at_low_load(simulation: Any, scenarios: dict[str, Any]) -> None:
    for name, alone in (("segmentation", 0.012), ("classifier", 0.00115)):
        summary = simulation.simulate(2000, seed=0, scenario=at(scenarios[name], 0.01, hiccups=0, warm_up=500))
        assert summary.refusal == 0
        assert summary.p50 == pytest.approx(alone, rel=0.03)
        assert summary.p99 < 2 * alone


@pytest.mark.parametrize(("clients", "rows", "busy"), [(1, 1.0, 0.9), (16, 8.0, 0.9)])
def test_clients_that_await_answers(simulation: Any, scenarios: dict[str, Any], clients: int, rows: float, busy: float) -> None:
    """Few clients all share a batch, and no worker waits for a request that cannot arrive."""
    summary = simulation.simulate(4000, seed=0, scenario=replace(scenarios["classifier"], clients=clients, objective=0.05, warm_up=2000))
    assert summary.batch_rows >= rows
    assert summary.busy > busy
    assert summary.refusal == 0


def test_machine_becomes_slow_and_recovers(simulation: Any, scenarios: dict[str, Any]) -> None:
    scenario = at(scenarios["classifier"], 0.15, slowness=lambda now: 5.0 if 3 < now < 5 else 1.0, hiccups=0, warm_up=0)
    summary = simulation.simulate(8_000, seed=1, scenario=scenario)
    assert summary.ended > 8
    assert summary.late_after < 5.2
    assert summary.inside > 0.99


def test_refusals_end_with_a_hiccup_of_300_ms(simulation: Any, scenarios: dict[str, Any]) -> None:
    scenario = at(scenarios["segmentation"], 0.2, slowness=lambda now: 25.0 if 20 < now < 20.1 else 1.0, hiccups=0, warm_up=0)
    summary = simulation.simulate(600, seed=0, scenario=scenario)
    assert summary.ended > 30
    assert 20 < summary.late_after < 20.6
    assert summary.dropped + summary.late < 12


@pytest.mark.soak
def test_urgent_requests_in_an_overload(simulation: Any, scenarios: dict[str, Any]) -> None:
    for name in ("segmentation", "classifier", "sizes"):
        scenario = at(scenarios[name], 1.5, priorities=(0.2, 0.8), hiccups=0)
        summary = simulation.simulate(20_000, seed=1, scenario=scenario)
        (urgent, urgent_inside), (lesser, lesser_inside) = summary.by_priority
        assert urgent > 0.9
        assert urgent_inside > 0.999
        assert 0.4 < lesser < urgent
        assert lesser_inside > 0.85
        assert summary.goodput > 0.85


def test_only_queue_bounds_without_objective(simulation: Any) -> None:
    scenario = replace(simulation.CHAOS, objective=None, deadlines=None)
    summary = simulation.simulate(3000, seed=0, scenario=scenario)
    assert summary.dropped == summary.late == 0
    assert set(summary.refused) == {"full"}


def test_all_faults_at_once(simulation: Any) -> None:
    """The simulation checks that every request has one outcome; this test checks the shares of the outcomes."""
    summary = simulation.simulate(12_000, seed=0)
    assert min(summary.cancelled, summary.failed, summary.dropped, summary.late, sum(summary.refused.values())) > 0
    assert summary.inside > 0.93
    assert summary.by_priority[0][1] > 0.99
    assert summary.goodput > 0.5


def test_equal_seeds_give_equal_summaries(simulation: Any) -> None:
    assert simulation.simulate(1000, seed=5) == simulation.simulate(1000, seed=5) != simulation.simulate(1000, seed=6)


def test_simulation_finds_mixed_up_answers(simulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_apart = simulation.taken_apart
    monkeypatch.setattr(simulation, "taken_apart", lambda computed, jobs: taken_apart(computed, jobs)[::-1])
    with pytest.raises(AssertionError, match="rows that are not its own"):
        simulation.simulate(1000, seed=0)
