"""The rules of a trial: bounds, counts and times. Engines and roll-back are in `test_routes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from muntin.serving.versions.rollout import ENOUGH, FEW, Rollout, Tally, compare_latencies, judge, label_agreement, tensor_agreement
from muntin.serving.versions.version import Latencies
from serving_parts import image_call

SMALL, LARGE = image_call((1, 8, 8)), image_call((4, 8, 8))


def times(small: list[float] | None = None, large: list[float] | None = None) -> Latencies:
    latencies = Latencies()
    for call, values in ((SMALL, small or []), (LARGE, large or [])):
        for seconds in values:
            latencies.add(call, seconds)
    return latencies


def verdict(rollout: Rollout, *, after: float = 1.0, ours: Latencies | None = None, base: Latencies | None = None, **seen: Any) -> Any:
    return judge(rollout, Tally(since=10.0, **seen), ours or Latencies(), base or Latencies(), now=10.0 + after)


@pytest.mark.parametrize(
    "values",
    [
        {"canary": 1.1},
        {"shadow": -0.1},
        {"for_requests": 0},
        {"for_seconds": -1},
        {"max_error_rate": float("nan")},
        {"min_agreement": "all"},
        {"max_slowdown": 0.5},
    ],
)
def test_bounds_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        Rollout(**values)


def test_length_of_a_trial() -> None:
    rollout = Rollout(for_requests=50, for_seconds=30)
    assert verdict(rollout, rows=49) is None
    assert verdict(rollout, rows=50).passed
    assert verdict(rollout, rows=3, after=30).passed
    assert verdict(rollout, rows=0, after=30).reason == "untried: no request in 30 s"


def test_failures() -> None:
    assert not verdict(Rollout(), rows=1, failed=1).passed
    rollout = Rollout(for_requests=100, max_error_rate=0.05)
    assert verdict(rollout, rows=5, failed=5) is None  # 95 good ones may follow
    assert not verdict(rollout, rows=6, failed=6).passed
    assert verdict(rollout, rows=100, failed=5).passed
    late = verdict(rollout, rows=5, failed=5, after=60)
    assert (late.passed, late.reason) == (False, "5 of its 5 rows failed (allowed: 5.00%)")


def test_overdue_images() -> None:
    late = verdict(Rollout(max_error_rate=1), rows=90, failed=3, overdue=3)
    assert (late.passed, late.reason) == (False, "it does not come back with 3 of its rows: its engine hangs")


def test_agreement() -> None:
    rollout = Rollout(shadow=1, min_agreement=0.9)
    assert verdict(rollout, rows=3, compared=3, agreed=0.0) is None
    refused = verdict(rollout, rows=ENOUGH, compared=ENOUGH, agreed=0.5 * ENOUGH)
    assert (refused.passed, refused.reason) == (False, "its answers agree by 50.0% (needed: 90.0%)")
    assert not verdict(rollout, rows=3, compared=3, agreed=2.0, after=60).passed
    assert verdict(rollout, rows=100, compared=100, agreed=91.0).passed


def test_times_of_equal_calls() -> None:
    base = times(small=[1.0] * 30, large=[4.0] * 30)
    assert compare_latencies(times(small=[1.1] * 30), base) == pytest.approx(1.1)
    assert compare_latencies(times(large=[4.0] * 30), base) == pytest.approx(1.0)
    assert compare_latencies(times(small=[1.0] * (FEW - 1)), base) is None
    assert compare_latencies(times(small=[9.0] * FEW), times(small=[0.0] * FEW)) is None
    assert compare_latencies(times(small=[2.0] * 10, large=[8.0] * 10), base) == pytest.approx(2.0)
    assert compare_latencies(times(small=[1.0] * 29 + [500.0]), base) == pytest.approx(1.0)  # one slow call says nothing
    assert compare_latencies(times(small=[1.0] * 30), times(small=[1.0] * 29 + [0.001])) == pytest.approx(1.0)


def test_slowness_before_the_end() -> None:
    base, slow = times(small=[1.0] * 30), times(small=[4.0] * 30)
    refused = verdict(Rollout(max_slowdown=3), rows=2 * ENOUGH, batches=2 * ENOUGH, ours=slow, base=base)
    assert (refused.passed, refused.reason) == (False, "it takes 4.0 times as long (allowed: 3)")
    assert verdict(Rollout(max_slowdown=5), rows=2 * ENOUGH, batches=2 * ENOUGH, ours=slow, base=base) is None


def test_slowness_at_the_end() -> None:
    rollout, base = Rollout(for_requests=100, max_slowdown=3), times(large=[1.0] * 30)
    for batches, passed in ((13, False), (FEW, False), (FEW - 1, True)):
        ours = times(large=[50.0] * batches)
        assert verdict(rollout, rows=8 * batches, batches=batches, ours=ours, base=base, after=60).passed is passed
    assert verdict(rollout, rows=104, batches=13, ours=times(large=[1.0] * 13), base=base).passed
    assert verdict(rollout, rows=104, batches=13, ours=times(large=[50.0] * 13), base=Latencies()).passed


@given(
    rows=st.integers(0, 300),
    failed=st.integers(0, 300),
    after=st.floats(0, 200),
    rate=st.floats(0, 1),
    requests=st.integers(1, 200),
)
def test_verdicts_are_final(rows: int, failed: int, after: float, rate: float, requests: int) -> None:
    """A refusal before the end would also be one at the end, had everything else gone well; and a trial has an end."""
    rollout = Rollout(max_error_rate=rate, for_requests=requests)
    early = verdict(rollout, rows=rows, failed=min(failed, rows), after=after)
    if early is None:
        assert rows < requests
        assert after < rollout.for_seconds
    elif not early.passed and rows < requests:
        assert not verdict(rollout, rows=requests, failed=min(failed, rows), after=after).passed or after >= rollout.for_seconds


def test_label_agreement(signature_of: Any) -> None:
    signature = signature_of(classes=("a", "b"))
    scores = np.zeros((1, 2, 2, 2), np.float32)
    scores[:, 1, 0] = 1
    other = np.concatenate([scores, scores - 1], axis=1)  # two more classes that are never the best
    other[0, 3, 1, 1] = 9
    assert label_agreement(scores, other, signature, labels=False) == 0.75
    assert label_agreement(scores.argmax(axis=1), other.argmax(axis=1), signature, labels=True) == 0.75
    assert label_agreement(scores, scores, signature_of(task="restore", classes=()), labels=False) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "agreement"),
    [
        ([1.0, -2.0, 3.0], [1.0, -2.0, 3.0], 1.0),
        ([1.0, 1.0], [1.2, 0.8], 0.9),
        ([1.0, -2.0], [-1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([1.0, np.nan, np.inf, 1.0], [1.0, np.nan, 7.0, 1.0], 0.75),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.75),
        ([True, False], [True, True], 0.5),
        ([1.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ([], [], 1.0),
    ],
)
def test_tensor_agreement(ours: list[Any], theirs: list[Any], agreement: float) -> None:
    same = np.arange(3)
    assert tensor_agreement({"same": same, "x": np.array(ours)}, {"same": same, "x": np.array(theirs)}) == pytest.approx(agreement)
