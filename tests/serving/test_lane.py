"""One group's waiting jobs: their order, how many fit, and how large a batch is worth while."""

from __future__ import annotations

import math

import pytest

from muntin.serving.job import Job
from muntin.serving.lane import Lane, Peak, Rate
from muntin.serving.latency import Line


def lane_of(*rows: int, line: Line | None = None) -> Lane:
    lane = Lane("g")
    for number, count in enumerate(rows, 1):
        job = Job(group="g", rows=count)
        job.standing, job.ticket = float(number), number
        lane.insert(job)
    if line is not None:
        lane.line = line
    return lane


def line(fixed: float, each: float, *, least: float = 0.0, largest: int = 64, seen: int = 100, firm: int = 64) -> Line:
    return Line(fixed, each, least, 1.1, largest, seen, firm)


def test_jobs_are_ordered_by_standing_then_ticket() -> None:
    lane = Lane("g")
    for ticket, standing in enumerate((3.0, 1.0, 2.0, 1.0), 1):
        job = Job(group="g")
        job.standing, job.ticket = standing, ticket
        lane.insert(job)
        assert lane.jobs[lane.index(job)][2] is job
    assert [ticket for _, ticket, _ in lane.jobs] == [2, 4, 3, 1]
    assert lane.standing == (1.0, 2)
    new = Job(group="g")
    new.standing = 1.0
    assert lane.index(new) == 2


def test_taking_jobs_from_anywhere() -> None:
    lane = lane_of(1, 2, 3, 4)
    jobs = [job for _, _, job in lane.jobs]
    assert lane.take([1, 3]) == (jobs[1], jobs[3])
    assert (lane.rows, [job for _, _, job in lane.jobs]) == (4, [jobs[0], jobs[2]])
    assert lane.take([0, 1]) == (jobs[0], jobs[2])
    assert (lane.rows, lane.jobs) == (0, [])


@pytest.mark.parametrize(
    ("rows", "first", "limit", "found"),
    [
        ((1, 1, 1, 1), 0, 3, (3, 3)),
        ((1, 1, 1, 1), 2, 3, (4, 2)),
        ((2, 2, 2), 0, 4, (2, 4)),
        ((2, 2, 2), 0, 5, (2, 4)),
        ((5, 1), 0, 2, (1, 5)),
        ((1, 5, 1), 0, 3, (1, 1)),
        ((2, 3), 0, 9, (2, 5)),
    ],
)
def test_as_many_as_fit_and_one_always(rows: tuple[int, ...], first: int, limit: int, found: tuple[int, int]) -> None:
    assert lane_of(*rows).until(first, limit) == found


def test_the_time_for_rows_in_batches() -> None:
    lane = lane_of(1, line=line(1.0, 0.5))
    lane.most = 4
    assert lane.span(0) == 0
    assert lane.span(3) == pytest.approx(2.5)
    assert lane.span(9) == pytest.approx(3.0 + 3.0 + 1.5)


def test_the_size_that_sustains_arrivals() -> None:
    lane = lane_of(1, line=line(1.0, 0.1))
    assert lane.sustaining(1.0, 0.0, 32) == 1
    lane.arrivals.add(4, 0.0)  # 4 rows a second: n / (1 + n / 10) * 0.8 >= 4 from n = 10
    assert lane.sustaining(1.0, 0.0, 32) == 10
    assert lane.sustaining(1.0, 0.0, 8) == 8
    assert lane.sustaining(2.0, 0.0, 32) == 4
    assert lane.sustaining(0.0, 0.0, 32) == 32
    lane.arrivals.add(10, 0.0)
    assert lane.sustaining(1.0, 0.0, 32) == 32


def test_what_is_worth_a_batch() -> None:
    assert lane_of(1, line=line(2.0, 1.0)).worth(3, 32, 64) == 32  # the fixed part outweighs a row
    assert lane_of(1, line=line(0.5, 1.0)).worth(3, 32, 64) == 3  # it gains a third: as many as arrivals call for
    assert lane_of(1, line=line(0.01, 1.0)).worth(3, 32, 64) == 1  # nothing to gain
    assert lane_of(1, line=line(0.01, 1.0, firm=0)).worth(1, 32, 64) == 1
    assert lane_of(1, line=line(0.0, 1.0, least=1.0)).worth(3, 32, 64) == 32  # one size measured: to be found out


def test_that_batches_gain_nothing_is_believed_of_sizes_that_were_seen() -> None:
    flat = lane_of(1, line=line(0.0, 1.0, firm=0))
    assert flat.worth(16, 16, 64) == 16  # nothing but single rows, often enough that there is a line: who knows
    flat.line = line(0.0, 1.0, firm=4)
    assert flat.worth(16, 16, 64) == 16  # what four rows took says little of sixteen
    assert flat.worth(8, 16, 64) == 1
    assert flat.worth(16, 16, 8) == 1  # larger ones would not keep the objective
    flat.line = line(0.0, 1.0, firm=8)
    assert flat.worth(16, 16, 64) == 1


def test_batches_grow_by_steps() -> None:
    assert lane_of(1).explored(32) == 1
    assert lane_of(1, line=line(1.0, 0.1, largest=4, seen=1)).explored(32) == 1
    assert lane_of(1, line=line(1.0, 0.1, largest=4, seen=2)).explored(32) == 8
    assert lane_of(1, line=line(1.0, 0.1, largest=4)).explored(5) == 5


def test_rates_and_peaks_fade() -> None:
    rate, peak = Rate(), Peak()
    assert (rate.per_second(5.0), peak.value(5.0)) == (0.0, 0.0)
    for step in range(5000):
        rate.add(2, step / 100)
    assert rate.per_second(50.0) == pytest.approx(200, rel=0.02)
    assert rate.per_second(52.0) == pytest.approx(200 * math.exp(-2), rel=0.02)
    peak.raise_to(8, 1.0)
    peak.raise_to(5, 1.1)
    assert peak.value(1.1) == pytest.approx(8 * math.exp(-0.1))
    peak.raise_to(5, 2.0)
    assert peak.value(2.0) == 5
