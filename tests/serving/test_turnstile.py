"""Refusals that hold for a while."""

from __future__ import annotations

import pytest

from muntin.serving.turnstile import Turnstile


def test_equal_requests_are_refused_until_it_opens() -> None:
    turnstile = Turnstile()
    assert turnstile.refused("a", 0.0) is None
    turnstile.shut("a", 2.0, 3.0, "three wait")
    assert turnstile.refused("a", 0.5) == (2.5, "three wait")  # when it is worth another try may be later than it is refused unread
    assert turnstile.refused("b", 0.5) is None
    assert turnstile.refused("a", 2.0) is None
    assert turnstile.count == 1


def test_whatever_happens_opens_it() -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 2.0, 2.0)
    turnstile.open()
    assert turnstile.refused("a", 0.5) is None
    turnstile.shut("a", 1.0, 1.0)
    assert turnstile.refused("a", 0.75) == (0.25, "")


def test_no_try_is_worth_it_before_it_would_be_let_through() -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 5.0, 1.0)
    assert turnstile.refused("a", 1.0) == (4.0, "")
    assert turnstile.refused("a", 2.0) == (3.0, "")


def test_what_was_refused_unseen_is_told_once() -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 2.0, 2.0)
    for came in (0.1, 0.2, 0.3):
        turnstile.refused("a", came)
    turnstile.open()
    turnstile.turn_away("a", 0.4)
    assert (turnstile.unseen("a", 0.5), turnstile.unseen("a", 0.5), turnstile.unseen("b", 0.5)) == (4, 0, 0)
    assert turnstile.count == 4


@pytest.mark.parametrize("then", ["asked", "refused"])
def test_what_was_refused_long_ago_is_no_arrival_of_now(then: str) -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 100.0, 100.0)
    for _ in range(1000):
        turnstile.refused("a", 0.5)
    if then == "refused":
        turnstile.refused("a", 60.0)
    assert turnstile.unseen("a", 60.0) == (1 if then == "refused" else 0)


def test_it_remembers_no_more_than_a_few_and_those_that_come_again() -> None:
    turnstile = Turnstile()
    for number in range(1000):
        turnstile.shut("often", 10.0, 10.0)
        turnstile.shut(number, 10.0, 10.0)
    assert len(turnstile._gates) == 64
    assert turnstile.refused(0, 1.0) is None
    assert turnstile.refused("often", 1.0) == turnstile.refused(999, 1.0) == (9.0, "")
