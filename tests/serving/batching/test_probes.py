"""Probes: jobs that would be late even alone are tried now and then."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest


def test_probes_of_a_slow_group_find_its_recovery(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05)
    now = 0.0
    for _ in range(9):
        batch = batching.occupy(batcher, now)
        now += 0.2
        batcher.done(batch, now, 0.2)
    batch = batching.occupy(batcher, now)  # nothing else waits or runs
    batching.refused(batcher, batching.job_of(), now, "late")
    batching.refused(batcher, batching.job_of(deadline=now + 0.01), now, "late")
    for _ in range(9):
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batching.occupy(batcher, now)
    batching.admitted(batcher, now, batching.job_of(), batching.job_of())


def test_refuse_huge_jobs_beside_a_fast_group(batching: Any) -> None:
    """Photographs of 22 megapixels take 2.2 s, other jobs 10 ms. Each size of photograph is sent once."""
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05, cost={"g": 1e5})
    batcher.done(batching.occupy(batcher, 0.0), 0.01, 0.01)
    now = 0.01
    for number in range(200):
        now += 0.02
        refusal = batching.refused(batcher, batching.job_of(f"huge {number}", cost=2.2e7 + number), now, "late")
        assert "send smaller images" in refusal.message
        assert batcher.submit(batching.job_of(cost=1e5), now) is None
        batcher.done(batching.batch_of(batcher, now), now + 0.01, 0.01)
    batching.admitted(batcher, now + 0.02, batching.job_of("large", cost=1.5e6))  # a few objectives
    batcher.done(batching.batch_of(batcher, now + 0.02), now + 0.17, 0.15)
    batching.admitted(batcher, now + 61, batching.job_of("huge", cost=2.2e7))  # no job has kept the objective for a minute


@pytest.mark.parametrize("seconds", [0.002, 0.032])
def test_probe_of_a_huge_guess(batching: Any, seconds: float) -> None:
    """From 0.5 ms for 64 x 64 the guess for 512 x 512 is 32 ms; it may take 2 ms."""
    batcher = batching.batcher_of(objective=0.005, cost={"small": 64**2})
    for number in range(2):
        batching.admitted(batcher, number, batching.job_of("small", cost=64**2))
        batcher.done(batching.batch_of(batcher, number), number + 0.0005, 0.0005)
    batching.refused(batcher, batching.job_of("far too large", cost=2048**2), 2.001, "late")
    now = 2.001
    for _ in range(2):
        batching.admitted(batcher, now, batching.job_of("large", cost=512**2))
        batcher.done(batching.batch_of(batcher, now), now + seconds, seconds)
        now += seconds
    if seconds < 0.005:
        batching.admitted(batcher, now, batching.job_of("other", cost=450**2))  # guessed from the measured group
    else:
        batching.refused(batcher, batching.job_of("other", cost=450**2), now, "late")  # all huge groups share one pause
        batching.admitted(batcher, 2.001 + 64 * 0.033, batching.job_of("other", cost=450**2))


def test_probes_of_a_huge_group_are_rare(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR, "slow": (1.0, 0.0)}, objective=0.05)
    times = []
    now = 0.0
    while now < 200:
        now += 0.5
        batcher.done(batching.occupy(batcher, now), now + 0.01, 0.01)
        if batcher.submit(batching.job_of("slow"), now + 0.01) is None:
            times.append(now)
            batcher.done(batching.batch_of(batcher, now + 0.01), now + 1.01, 1.0)
            now += 1.01
    assert len(times) == 4
    assert min(later - earlier for earlier, later in pairwise(times)) > 60


def test_stalled_group_is_not_huge(batching: Any) -> None:
    """Stalls of the machine make the spread of the latency large, not its expected value."""
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.5)
    batcher.done(batching.occupy(batcher, 0.0), 0.01, 0.01)
    now = 1.0
    for number in range(40):
        batching.admitted(batcher, now, batching.job_of("stalled"))
        took = 1.7 if number % 6 == 5 else 0.02
        batcher.done(batching.batch_of(batcher, now), now + took, took)
        now += took + 0.1
    latency = batcher._queue.group_of(batching.job_of("stalled")).latency
    assert latency.safe(1) > 4 * 0.5 > 20 * latency.expected(1)
    batching.admitted(batcher, now, batching.job_of("stalled"))


def test_probes_of_a_slow_group_beside_others(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR, "slow": (1.0, 0.0)}, objective=0.3)
    batch = batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, batching.job_of("slow"))
    batcher.done(batch, 0.01, 0.01)
    batch = batching.batch_of(batcher, 0.01)
    batcher.done(batch, 1.01, 1.0)
    batching.occupy(batcher, 1.01)
    batching.refused(batcher, batching.job_of("slow"), 1.01, "late")
    batching.refused(batcher, batching.job_of("slow"), 7.9, "late")
    batching.admitted(batcher, 8.5, batching.job_of("slow"))
