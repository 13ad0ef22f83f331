"""How sessions go that nobody uses. When they go is in `test_slot`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from muntin.serving.probation import REST
from muntin.serving.rollout import Rollout
from muntin.serving.slot import Slot


def test_what_an_old_version_held_goes_in_pieces_with_rests_between(
    shelf: Any, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    freed: list[tuple[int, str]] = []

    def dismantle() -> Iterator[None]:
        for piece in range(3):
            freed.append((piece, threading.current_thread().name))
            yield

    def rest_after(started: float, rest: float) -> float:
        rests.append(rest)
        return 0.0

    monkeypatch.setattr("muntin.serving.disposal.rest_after", rest_after)
    slot = Slot("model", shelf, rollout=Rollout(for_seconds=0))
    old = slot.load("1", "1")
    old.session.__dict__["dismantle"] = dismantle  # monkeypatch would hold the session
    gone = weakref.ref(old.session)
    slot.load("2", "2")
    wait_until(lambda: gone() is None)
    assert freed == [(piece, "muntin-unload") for piece in range(3)]
    assert rests == [REST] * 3
