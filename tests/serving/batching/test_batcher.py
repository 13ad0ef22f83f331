"""The batcher: bounds, order, expiry and ending, and its invariants under any sequence of events."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from muntin.serving.batching.batcher import Decision
from muntin.serving.batching.queues import REMEMBERED_GROUPS


def test_refuse_too_large_request(batching: Any) -> None:
    batcher = batching.batcher_of(max_rows=8, queue_bytes=100)
    refusal = batching.refused(batcher, batching.job_of(rows=9), 0.0, "too large")
    assert "at most 8 rows and 100 bytes" in refusal.message
    assert refusal.retry_after is None
    batching.refused(batcher, batching.job_of(nbytes=101), 0.0, "too large")
    batching.admitted(batcher, 0.0, batching.job_of(rows=8, nbytes=100))


def test_refuse_when_queue_is_full(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, max_rows=4, queue_rows=10, queue_bytes=100)
    batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, batching.job_of(rows=4), batching.job_of(rows=4))
    refusal = batching.refused(batcher, batching.job_of(rows=3), 0.0, "full")
    assert "8 rows" in refusal.message
    assert refusal.retry_after == pytest.approx(0.08 / 11, rel=0.2)
    batching.admitted(batcher, 0.0, batching.job_of(rows=2, nbytes=60))
    batcher = batching.batcher_of(queue_bytes=100)
    batching.admitted(batcher, 0.0, batching.job_of(nbytes=60))
    assert batching.refused(batcher, batching.job_of(nbytes=41), 0.0, "full").retry_after is None  # nothing is known of the group
    batching.admitted(batcher, 0.0, batching.job_of(nbytes=40))


def test_refuse_while_draining(batching: Any) -> None:
    batcher = batching.batcher_of()
    batching.admitted(batcher, 0.0, batching.job_of(), batching.job_of())
    batcher.drain()
    batching.refused(batcher, batching.job_of(), 0.0, "draining")
    assert batcher.poll(0.0).batch is not None


def test_order_by_priority_due_time_and_arrival(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, max_rows=1, queue_rows=100)
    batching.occupy(batcher, 0.0)
    late, soon, urgent, same = (
        batching.job_of(deadline=0.9),
        batching.job_of(deadline=0.5),
        batching.job_of(priority=0, deadline=0.4),
        batching.job_of(deadline=0.5),
    )
    lesser = batching.job_of(priority=1, deadline=0.3)
    batching.admitted(batcher, 0.0, lesser, late, soon, urgent, same)
    order = []
    for step in range(5):
        now = 0.01 * (step + 1)
        batcher.done(batcher._queue.running[0].batch, now, 0.01)
        order += batching.jobs_of(batcher, now)
    assert order == [urgent, soon, same, late, lesser]


def test_order_of_a_far_deadline(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, max_rows=1, queue_rows=1000)
    batch = batching.occupy(batcher, 0.0)
    distant = batching.job_of(deadline=3600.0)
    batching.admitted(batcher, 0.0, *(batching.job_of() for _ in range(3)), distant)
    now = 0.0
    for _ in range(4):
        batching.admitted(batcher, now, batching.job_of(), batching.job_of())
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batching.batch_of(batcher, now)
    assert batch.jobs == (distant,)


def test_order_of_patient_jobs(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, max_rows=1, queue_rows=1000, objective=5.0)
    batch = batching.occupy(batcher, 0.0)
    promised = [batching.job_of(priority=2) for _ in range(3)]
    batching.admitted(batcher, 0.0, *promised)
    batching.admitted(batcher, 0.001, tile := batching.job_of(priority=3, patient=True))
    order = []
    for step in range(1, 5):
        batcher.done(batch, 0.01 * step, 0.01)
        batch = batching.batch_of(batcher, 0.01 * step)
        order += batch.jobs
    assert order == [*promised, tile]


def test_no_job_starves(batching: Any) -> None:
    """A job of priority 2 goes before every job that arrives more than twice the patience later."""
    batcher = batching.batcher_of({"g": batching.LINEAR}, max_rows=1, queue_rows=100, patience=0.1)
    batch = batching.occupy(batcher, 0.0)
    patient = batching.job_of(priority=2)
    batching.admitted(batcher, 0.0, patient)
    now = 0.0
    while True:
        batching.admitted(batcher, now, batching.job_of(), batching.job_of())
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batching.batch_of(batcher, now)
        if patient in batch.jobs:
            break
        assert batch.jobs[0].arrived <= 0.2
    assert 0.2 < now < 0.6


@pytest.mark.parametrize("tile", [0.04, 0.25])
@pytest.mark.parametrize("rate", [30, 300])
def test_picture_in_tiles_beside_traffic(batching: Any, tile: float, rate: float) -> None:
    """A tile takes about as long as the objective, 50 ms, or longer."""
    took, kept, refusals, dropped = batching.beside_traffic(tiles=20, tile=tile, rate=rate, objective=0.05)
    assert max(took) < 2.1 + tile
    assert len(kept) > 30
    assert max(job.payload - job.due for job in kept) <= 1e-9
    assert dropped <= len(kept) / 1000  # foreseen in a batch that then had no room
    if rate == 30 and tile == 0.04:
        assert refusals < 0.6 * (len(kept) + refusals)


def test_patient_jobs_in_a_full_queue(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05, max_rows=4, queue_rows=4, queue_bytes=10)
    batching.occupy(batcher, 0.0)
    patient = [batching.job_of(patient=True, rows=4, nbytes=8) for _ in range(3)]
    batching.admitted(batcher, 0.0, *patient)
    assert {job.due for job in patient} == {math.inf}
    batching.refused(batcher, batching.job_of(), 0.0, "full")
    batching.refused(batcher, batching.job_of(patient=True, nbytes=11), 0.0, "too large")
    batching.refused(batcher, batching.job_of(patient=True, deadline=0.001), 0.0, "late")


def test_expire_while_no_worker_is_free(batching: Any) -> None:
    batcher = batching.batcher_of()
    batching.occupy(batcher, 0.0)
    early, late, never = batching.job_of(deadline=1.0), batching.job_of(deadline=2.0), batching.job_of()
    batching.admitted(batcher, 0.0, early, late, never)
    assert batcher.expire(1.0) == ()
    assert [(job, refusal.kind) for job, refusal in batcher.expire(1.5)] == [(early, "late")]
    batcher.cancel(late)
    assert batcher.expire(2.1) == ()
    assert batcher.snapshot().waiting_jobs == 1


def test_drop_late_job_unless_it_waits_alone(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.03)
    batch = batching.occupy(batcher, 0.0)
    first, second = batching.job_of(), batching.job_of()
    batching.admitted(batcher, 0.0, first)
    batching.admitted(batcher, 0.005, second)
    batcher.done(batch, 0.024, None)  # longer than foreseen: 6 ms left for the first, 11 for the second
    step = batcher.poll(0.024)
    assert [job for job, _ in step.dropped] == [first]
    assert step.batch is not None
    assert step.batch.jobs == (second,)
    assert step.dropped[0][1].retry_after is not None
    batcher.done(step.batch, 0.034, 0.01)
    batch = batching.occupy(batcher, 0.04)
    alone = batching.job_of()
    batching.admitted(batcher, 0.04, alone)
    batcher.done(batch, 0.065, None)
    assert batching.jobs_of(batcher, 0.065) == [alone]


def test_failed_batch_is_not_learned(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05)
    for step in range(20):
        batcher.done(batching.occupy(batcher, float(step)), step + 0.5, None)
    batching.admitted(batcher, 30.0, *(batching.job_of() for _ in range(3)))


def test_two_workers(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.045, workers=2)
    jobs = [batching.job_of() for _ in range(10)]
    kept = [job for job in jobs if batcher.submit(job, 0.0) is None]
    assert len(kept) == 8
    batches = [batching.batch_of(batcher, 0.0), batching.batch_of(batcher, 0.0)]
    assert [batch.jobs for batch in batches] == [(kept[0],), (kept[1],)]
    assert batcher.poll(0.0) == Decision(None, (), None)
    batcher.done(batches[1], 0.01, 0.01)
    assert batching.batch_of(batcher, 0.01).jobs == (kept[2],)


def test_snapshot(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.035, max_rows=4, queue_rows=4)
    batch = batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, batching.job_of(nbytes=7), batching.job_of())
    batching.refused(batcher, batching.job_of(), 0.0, "late")
    batching.refused(batcher, batching.job_of(rows=5), 0.0, "too large")
    batching.refused(batcher, batching.job_of(rows=3), 0.0, "full")
    snapshot = batcher.snapshot()
    assert snapshot.refused == {"full": 1, "late": 1, "too large": 1, "draining": 0, "stuck": 0}
    assert (snapshot.waiting_jobs, snapshot.waiting_rows, snapshot.waiting_bytes, snapshot.waiting_groups) == (2, 2, 7, 1)
    assert (snapshot.running_batches, snapshot.running_rows, snapshot.admitted, snapshot.finished) == (1, 1, 3, 0)
    assert snapshot.backlog_s == pytest.approx(0.02, rel=0.05)
    batcher.done(batch, 0.01, 0.01)
    assert batcher.snapshot().finished == 1


def test_old_groups_are_forgotten(batching: Any) -> None:
    batcher = batching.batcher_of(objective=1.0)
    for number in range(3 * REMEMBERED_GROUPS):
        batcher.done(batching.occupy(batcher, float(number), f"g{number}"), number + 0.5, 0.001)
    assert len(batcher._queue.groups) <= REMEMBERED_GROUPS


def test_any_sequence_of_events(batching: Any) -> None:
    run_state_machine_as_test(batching.AnySequence, settings=batching.AnySequence.TestCase.settings)
