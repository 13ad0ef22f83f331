"""How sessions go that nobody uses. When they go is in `test_slot`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from muntin.serving.disposal import dispose
from muntin.serving.rollout import Rollout
from muntin.serving.slot import Slot


def test_what_an_old_version_held_is_closed_on_a_thread_of_its_own(shelf: Any, wait_until: Callable[..., None]) -> None:
    closed: list[str] = []
    slot = Slot("model", shelf, rollout=Rollout(for_seconds=0))
    old = slot.load("1", "1")
    old.session.__dict__["close"] = lambda: closed.append(threading.current_thread().name)  # monkeypatch would hold the session
    gone = weakref.ref(old.session)
    slot.load("2", "2")
    wait_until(lambda: gone() is None)
    assert closed == ["muntin-unload"]


def test_where_there_are_no_new_threads_any_more_it_is_closed_at_once(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    session = Slot("model", shelf, rollout=Rollout()).load("1", "1").session
    session.__dict__["close"] = lambda: closed.append(threading.current_thread().name)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    dispose([session])
    assert closed == [threading.current_thread().name]
