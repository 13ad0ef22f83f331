"""The batches that will be formed of what waits: how large, when, and where a new job would come among them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from muntin.serving.forecast import DEPTH, Forecast, Run
from muntin.serving.job import Batch, Job
from muntin.serving.lane import Lane
from muntin.serving.latency import Line

ONE = 1.0 + 1e-12
"""Spread of an engine whose time is known."""


def lane_of(group: str, *standings: float, fixed: float = 1.0, each: float = 0.1, most: int = 4, due: float = math.inf, **job: Any) -> Lane:
    lane = Lane(group)
    lane.line = Line(fixed, each, 0.0, ONE, 64, 100, True)
    lane.most = most
    for ticket, standing in enumerate(standings, 1):
        lane.insert(job_of(group, standing, ticket=ticket, due=due, **job))
    lane.seconds = lane.span(lane.rows)
    return lane


def job_of(group: str, standing: float, *, ticket: int = 0, due: float = math.inf, **fields: Any) -> Job:
    job = Job(group=group, **fields)
    job.standing, job.ticket, job.due = standing, ticket, due
    return job


def forecast_of(*lanes: Lane, free: tuple[float, ...] = (0.0,), margin: float = 0.0) -> Forecast:
    backlog = sum(lane.seconds for lane in lanes)
    return Forecast(lanes, [(end, 0.0) for end in free], margin=margin, backlog=backlog)


def shown(forecast: Forecast) -> list[tuple[Any, int, float]]:
    return [(batch.lane.group, batch.rows, round(batch.start, 6)) for batch in forecast.batches]


def test_batches_go_by_the_standing_of_their_head() -> None:
    a, b = lane_of("a", 1, 3, 4, 5, 6, 7), lane_of("b", 2, 8)
    assert shown(forecast_of(a, b, free=(5.0,))) == [("a", 4, 5.0), ("b", 2, 6.4), ("a", 2, 7.6)]


def test_the_worker_that_is_free_first_takes_the_next_batch() -> None:
    a, b = lane_of("a", 1), lane_of("b", 2)
    forecast = forecast_of(a, b, free=(5.0, 4.0))
    assert shown(forecast) == [("a", 1, 4.0), ("b", 1, 5.0)]
    assert forecast.end == pytest.approx(5.1)


def test_a_head_with_little_time_gets_a_small_batch() -> None:
    forecast = forecast_of(lane_of("a", 1, 2, 3, 4, due=1.25))
    assert shown(forecast)[:2] == [("a", 2, 0.0), ("a", 1, 1.2)]  # the next one would be late: alone
    assert forecast.batches[0].limit == 2
    assert shown(forecast_of(lane_of("a", 1, 2, 3, 4, due=1.25), margin=0.1))[0] == ("a", 1, 0.0)


def test_beyond_the_depth_things_go_on_as_before() -> None:
    standings = [float(n) for n in range(4 * (DEPTH + 10))]
    forecast = forecast_of(lane_of("a", *standings), free=(1.0,))
    assert len(forecast.batches) == DEPTH
    assert forecast.end == pytest.approx(1.0 + (DEPTH + 10) * 1.4)
    hurried = forecast_of(lane_of("a", *standings, due=1.15), free=(0.0,))
    assert {batch.rows for batch in hurried.batches} == {1}
    assert hurried.end == pytest.approx(len(standings) * 1.1)


def test_variances_add_up() -> None:
    lane = lane_of("a", 1, 2, 3, 4, 5)
    lane.line = lane.line._replace(spread=1.5)
    forecast = Forecast([lane], [(2.0, 0.09)], margin=0.0, backlog=lane.seconds)
    first, second = forecast.batches
    assert first.finish == pytest.approx(2 + 1.4 + math.sqrt(0.09 + 0.7**2))
    assert second.variance == pytest.approx(0.09 + 0.7**2)
    assert forecast.variance == pytest.approx(0.09 + 0.7**2 + 0.55**2)


def test_a_new_job_joins_the_last_batch_of_its_group_that_has_room() -> None:
    a, b = lane_of("a", 1, 3), lane_of("b", 2)
    place = forecast_of(a, b).place(job_of("a", 9), a)
    assert (place.rows, place.start, place.behind) == (3, 0.0, 1)
    assert place.delay == pytest.approx(0.1)


def test_a_new_job_without_room_comes_at_the_end() -> None:
    a, b = lane_of("a", 1, 3, 4, 5), lane_of("b", 2)
    place = forecast_of(a, b).place(job_of("a", 9), a)
    assert (place.rows, place.start, place.delay) == (1, pytest.approx(1.4 + 1.1), 0.0)


def test_a_more_urgent_job_takes_the_place_of_the_last_of_a_full_batch() -> None:
    a = lane_of("a", 1, 3, 4, 5, 6)
    place = forecast_of(a).place(job_of("a", 2), a)
    assert (place.rows, place.start, place.behind) == (4, 0.0, 1)
    assert place.delay == pytest.approx(0.1)


def test_a_more_urgent_job_takes_its_group_along() -> None:
    a, b = lane_of("a", 2), lane_of("b", 3)
    place = forecast_of(a, b).place(job_of("b", 1), b)
    assert (place.rows, place.start, place.behind) == (2, 0.0, 0)


def test_a_more_urgent_job_of_another_group_goes_before() -> None:
    a = lane_of("a", 2)
    b = lane_of("b")
    place = forecast_of(a, free=(3.0,)).place(job_of("b", 1), b)
    assert (place.rows, place.start, place.behind) == (1, 3.0, 0)
    assert place.delay == pytest.approx(1.1)


def test_harm_is_done_to_what_was_in_time_and_is_no_more() -> None:
    forecast = forecast_of(lane_of("a", 2, due=2.0, priority=1))
    place = forecast.place(job_of("b", 1), lane_of("b"))
    assert forecast.harm(place, 1) == pytest.approx(0.2)
    assert forecast.harm(place, 2) == pytest.approx(0.2)
    assert forecast.harm(place, 0) == 0  # more urgent: it may
    lost = forecast_of(lane_of("a", 2, due=1.0))
    assert lost.harm(lost.place(job_of("b", 1), lane_of("b")), 0) == 0  # late in any case
    easy = forecast_of(lane_of("a", 2, due=9.0))
    assert easy.harm(easy.place(job_of("b", 1), lane_of("b")), 0) == 0


def test_what_a_running_batch_has_left() -> None:
    lane = lane_of("a", 1)
    lane.line = lane.line._replace(spread=1.5)
    run = Run(Batch((lane.head,), "a", 1), lane, 10.0)  # 1.1 s, safe 1.65 s
    assert run.left(10.0) == pytest.approx(1.1)
    assert run.left(11.0) == pytest.approx(0.1)
    assert run.left(11.5) == 0.0
    assert run.left(13.0) == pytest.approx(3.0)
    assert run.free(11.0) == (pytest.approx(11.1), pytest.approx(0.01))
    assert run.free(10.1) == (pytest.approx(11.1), pytest.approx(0.55**2))
