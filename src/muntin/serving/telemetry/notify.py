"""Notifications: lines for the person who runs a server, sent in the midst of its work."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

Notify = Callable[[str], None]


def tell_nobody(line: str) -> None:
    """Ignore a notification."""


def told_safely(notify: Notify) -> Notify:
    """Return `notify` with what it raises reported to `threading.excepthook`: the batch that a line comes from must not end by it."""

    def tell(line: str) -> None:
        try:
            notify(line)
        except Exception:  # noqa: BLE001 - the caller's code; it is reported, and ends this notification
            with suppress(OSError, ValueError):  # standard error may be what is broken
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    return tell
