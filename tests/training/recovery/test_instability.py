"""The judgement of losses."""

from __future__ import annotations

from muntin.training.recovery.instability import LEAST, ROLLBACKS, SKIPPED_IN_A_ROW, GuardState, LossGuard


def settled(factor: float | None) -> LossGuard:
    """A guard that has seen losses fall from 2 to 0.1."""
    guard = LossGuard(factor)
    for step in range(150):
        guard.accept(max(0.1, 2 - step * 0.05))
    return guard


def test_faults() -> None:
    guard = settled(10.0)
    assert "the loss is nan" in guard.fault(float("nan")) and "inf" in guard.fault(float("inf"))
    assert guard.fault(0.9) == ""  # under ten medians
    assert guard.fault(1.2) == ""  # no worse than an untrained network
    assert guard.fault(3.0) == "the loss is 3, 30 times its median over 100 steps (0.1)"
    assert settled(None).fault(1e9) == ""
    known_by_heart = LossGuard(10.0)
    for _ in range(LEAST):
        known_by_heart.accept(1e-7)
    assert known_by_heart.fault(1e-4) == "" != known_by_heart.fault(0.6)
    fresh = LossGuard(2.0)
    for _ in range(LEAST - 1):
        fresh.accept(1.0)
    assert fresh.fault(1e3) == "" and (fresh.accept(1.0) or fresh.fault(1e3)) != ""


def test_skipping_and_going_back() -> None:
    guard = settled(10.0)
    earlier = GuardState(recent=[0.5], first=[2.0], skipped=3)
    for rollback in range(ROLLBACKS):
        assert [guard.skip() for _ in range(SKIPPED_IN_A_ROW + 1)] == [True] * SKIPPED_IN_A_ROW + [False]
        skipped = guard.state.skipped
        assert guard.go_back(earlier, steps=7)
        assert guard.state == GuardState(recent=[0.5], first=[2.0], skipped=skipped + 7, rollbacks=rollback + 1)
    assert not guard.go_back(earlier, steps=7) and earlier.skipped == 3


def test_a_step_ends_a_row() -> None:
    guard = LossGuard(None)
    for _ in range(3 * SKIPPED_IN_A_ROW):
        assert guard.skip()
        guard.accept(1.0)
    assert guard.state.skipped == 3 * SKIPPED_IN_A_ROW and guard.state.in_a_row == 0
