"""Notifications: lines for the operator of a server."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

Notify = Callable[[str], None]


def tell_nobody(line: str) -> None:
    """Ignore a notification."""


def told_safely(notify: Notify) -> Notify:
    """Return `notify` with its errors passed to `threading.excepthook`, since they must not end the batch that a line comes from."""

    def tell(line: str) -> None:
        try:
            notify(line)
        except Exception:  # noqa: BLE001 - the caller's code; reported
            with suppress(OSError, ValueError):  # standard error may be what is broken
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    return tell
