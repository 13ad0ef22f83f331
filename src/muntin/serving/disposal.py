"""What becomes of the sessions of versions that went: they are freed on a thread of their own, in pieces.

Freeing a model takes up to a fifth of a second, and the last lease may be given back by an event loop.
"""

from __future__ import annotations

import time
from contextlib import suppress
from threading import Event, Thread

from muntin.runtime.session import Session
from muntin.serving.probation import REST
from muntin.serving.scheduling import take_short_turns
from muntin.serving.version import rest_after


def dispose(sessions: list[Session], closed: Event) -> None:
    """Frees sessions that nobody uses, beside those that serve, and without rests once it is `closed`: nobody is served any more."""
    with suppress(RuntimeError):  # there may be no new threads any more, at the end of the process: then they go here
        Thread(target=_let_go, args=(sessions, closed), name="muntin-unload").start()


def _let_go(sessions: list[Session], closed: Event) -> None:
    """A piece at a time, with rests between as when a version is opened.

    Not at low priority: the allocator's locks are held meanwhile, and who waits for one would wait for a turn of this thread.
    """
    take_short_turns()
    while sessions:
        pieces = sessions.pop().dismantle()  # a generator: it holds the session until it ends
        started = time.perf_counter()
        for _ in pieces:
            closed.wait(rest_after(started, REST))
            started = time.perf_counter()
