"""Refusals that hold for a while."""

from __future__ import annotations

from muntin.serving.turnstile import Turnstile


def test_equal_requests_are_refused_until_it_opens() -> None:
    turnstile = Turnstile()
    assert turnstile.left("a", 0.0) == 0.0
    turnstile.shut("a", 2.0)
    assert turnstile.left("a", 0.5) == 1.5
    assert turnstile.left("b", 0.5) == 0.0
    assert turnstile.left("a", 2.0) == 0.0
    assert turnstile.count == 1


def test_what_was_refused_unseen_is_told_once() -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 2.0)
    for came in (0.1, 0.2, 0.3):
        turnstile.left("a", came)
    turnstile.turn_away("a")
    assert (turnstile.unseen("a"), turnstile.unseen("a"), turnstile.unseen("b")) == (4, 0, 0)
    assert turnstile.count == 4


def test_another_refusal_never_opens_it_earlier() -> None:
    turnstile = Turnstile()
    turnstile.shut("a", 2.0)
    turnstile.shut("a", 1.0)
    assert turnstile.left("a", 1.5) == 0.5


def test_it_remembers_no_more_than_a_few() -> None:
    turnstile = Turnstile()
    for number in range(1000):
        turnstile.shut(number, 10.0)
    assert len(turnstile._gates) == 64
    assert turnstile.left(0, 1.0) == 0.0 and turnstile.left(999, 1.0) == 9.0
