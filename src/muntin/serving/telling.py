"""Lines for whoever watches a server, told in the midst of its work: what telling them raises must not end that."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

Notify = Callable[[str], None]


def told_safely(notify: Notify) -> Notify:
    """`notify`, but what it raises is reported where the exceptions of threads are (`threading.excepthook`), and ends nothing."""

    def tell(line: str) -> None:
        try:
            notify(line)
        except Exception:  # noqa: BLE001 - the batch, or the watching, that the line comes from goes on
            with suppress(OSError, ValueError):  # standard error may be what is broken
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    return tell
