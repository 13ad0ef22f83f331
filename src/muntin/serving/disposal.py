"""What becomes of the sessions of versions that went: a thread of its own closes them.

Ending a process, or freeing a model, takes up to a fifth of a second, and the last lease may be given back by an event loop.
"""

from __future__ import annotations

from threading import Thread

from muntin.runtime.session import Session


def dispose(sessions: list[Session]) -> None:
    """Closes sessions that nobody uses, and drops them."""
    try:
        Thread(target=_close, args=(sessions,), name="muntin-unload").start()
    except RuntimeError:  # at the end of the process there may be no new threads any more
        _close(sessions)


def _close(sessions: list[Session]) -> None:
    while sessions:
        sessions.pop().close()
