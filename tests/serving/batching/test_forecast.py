"""The plan of the batches to come: their rows and times, and the place of a new job among them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from muntin.serving.batching.forecast import DEPTH, Forecast
from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.latency_model import LatencyLine
from muntin.serving.batching.queues import GroupQueue, RunningBatch

ONE = 1.0 + 1e-12
"""Spread of an engine whose time is certain."""


def queue_of(
    group: str, *standings: float, fixed: float = 1.0, per_row: float = 0.1, batch_rows: int = 4, due: float = math.inf, **job: Any
) -> GroupQueue:
    queue = GroupQueue(group)
    queue.latency = LatencyLine(fixed, per_row, 0.0, ONE, 64, 100, True)
    queue.batch_rows = batch_rows
    for ticket, standing in enumerate(standings, 1):
        queue.insert(job_of(group, standing, ticket=ticket, due=due, **job))
    queue.backlog = queue.seconds_for(queue.rows)
    return queue


def job_of(group: str, standing: float, *, ticket: int = 0, due: float = math.inf, **fields: Any) -> Job:
    job = Job(group=group, **fields)
    job.standing, job.ticket, job.due = standing, ticket, due
    return job


def forecast_of(*groups: GroupQueue, free: tuple[float, ...] = (0.0,), margin: float = 0.0) -> Forecast:
    backlog = sum(queue.backlog for queue in groups)
    return Forecast(groups, [(end, 0.0) for end in free], margin=margin, backlog=backlog)


def shown(forecast: Forecast) -> list[tuple[Any, int, float]]:
    return [(batch.group.group, batch.rows, round(batch.start, 6)) for batch in forecast.batches]


def test_batches_by_standing_of_their_head() -> None:
    a, b = queue_of("a", 1, 3, 4, 5, 6, 7), queue_of("b", 2, 8)
    assert shown(forecast_of(a, b, free=(5.0,))) == [("a", 4, 5.0), ("b", 2, 6.4), ("a", 2, 7.6)]


def test_first_free_worker_takes_next_batch() -> None:
    a, b = queue_of("a", 1), queue_of("b", 2)
    forecast = forecast_of(a, b, free=(5.0, 4.0))
    assert shown(forecast) == [("a", 1, 4.0), ("b", 1, 5.0)]
    assert forecast.end == pytest.approx(5.1)


def test_small_batch_for_an_early_due_time() -> None:
    forecast = forecast_of(queue_of("a", 1, 2, 3, 4, due=1.25))
    assert shown(forecast)[:2] == [("a", 2, 0.0), ("a", 1, 1.2)]  # the next one would be late: alone
    assert forecast.batches[0].limit == 2
    assert shown(forecast_of(queue_of("a", 1, 2, 3, 4, due=1.25), margin=0.1))[0] == ("a", 1, 0.0)


def test_end_beyond_the_depth() -> None:
    standings = [float(n) for n in range(4 * (DEPTH + 10))]
    forecast = forecast_of(queue_of("a", *standings), free=(1.0,))
    assert len(forecast.batches) == DEPTH
    assert forecast.end == pytest.approx(1.0 + (DEPTH + 10) * 1.4)
    hurried = forecast_of(queue_of("a", *standings, due=1.15), free=(0.0,))
    assert {batch.rows for batch in hurried.batches} == {1}
    assert hurried.end == pytest.approx(len(standings) * 1.1)


def test_variances_add_up() -> None:
    queue = queue_of("a", 1, 2, 3, 4, 5)
    queue.latency = queue.latency._replace(spread=1.5)
    forecast = Forecast([queue], [(2.0, 0.09)], margin=0.0, backlog=queue.backlog)
    first, second = forecast.batches
    assert first.finish == pytest.approx(2 + 1.4 + math.sqrt(0.09 + 0.7**2))
    assert second.variance == pytest.approx(0.09 + 0.7**2)
    assert forecast.variance == pytest.approx(0.09 + 0.7**2 + 0.55**2)


def test_place_in_last_batch_with_room() -> None:
    a, b = queue_of("a", 1, 3), queue_of("b", 2)
    place = forecast_of(a, b).place(job_of("a", 9), a)
    assert (place.rows, place.start, place.behind) == (3, 0.0, 1)
    assert place.delay == pytest.approx(0.1)


def test_place_at_the_end() -> None:
    a, b = queue_of("a", 1, 3, 4, 5), queue_of("b", 2)
    place = forecast_of(a, b).place(job_of("a", 9), a)
    assert (place.rows, place.start, place.delay) == (1, pytest.approx(1.4 + 1.1), 0.0)


def test_place_of_urgent_job_in_full_batch() -> None:
    a = queue_of("a", 1, 3, 4, 5, 6)
    place = forecast_of(a).place(job_of("a", 2), a)
    assert (place.rows, place.start, place.behind) == (4, 0.0, 1)
    assert place.delay == pytest.approx(0.1)


def test_place_of_urgent_job_moves_its_batch() -> None:
    a, b = queue_of("a", 2), queue_of("b", 3)
    place = forecast_of(a, b).place(job_of("b", 1), b)
    assert (place.rows, place.start, place.behind) == (2, 0.0, 0)


def test_place_of_urgent_job_of_new_group() -> None:
    a = queue_of("a", 2)
    b = queue_of("b")
    place = forecast_of(a, free=(3.0,)).place(job_of("b", 1), b)
    assert (place.rows, place.start, place.behind) == (1, 3.0, 0)
    assert place.delay == pytest.approx(1.1)


def test_lateness_caused() -> None:
    forecast = forecast_of(queue_of("a", 2, due=2.0, priority=1))
    place = forecast.place(job_of("b", 1), queue_of("b"))
    assert forecast.lateness_caused(place, 1) == pytest.approx(0.2)
    assert forecast.lateness_caused(place, 2) == pytest.approx(0.2)
    assert forecast.lateness_caused(place, 0) == 0  # a more urgent job may
    lost = forecast_of(queue_of("a", 2, due=1.0))
    assert lost.lateness_caused(lost.place(job_of("b", 1), queue_of("b")), 0) == 0  # late in any case
    easy = forecast_of(queue_of("a", 2, due=9.0))
    assert easy.lateness_caused(easy.place(job_of("b", 1), queue_of("b")), 0) == 0


def test_remaining_time_of_running_batch() -> None:
    queue = queue_of("a", 1)
    queue.latency = queue.latency._replace(spread=1.5)
    run = RunningBatch(Batch((queue.head,), "a", 1), queue, 10.0)  # 1.1 s, safe 1.65 s
    assert run.remaining(10.0) == pytest.approx(1.1)
    assert run.remaining(11.0) == pytest.approx(0.1)
    assert run.remaining(11.5) == 0.0
    assert run.remaining(13.0) == pytest.approx(3.0)
    assert run.end(11.0) == (pytest.approx(11.1), pytest.approx(0.01))
    assert run.end(10.1) == (pytest.approx(11.1), pytest.approx(0.55**2))
