"""A pool of threads that have ended when its block ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import get_native_id

LONGEST_WAIT_S = 1.0
POLL_S = 1e-4
_TASKS = Path("/proc/self/task")


@contextmanager
def thread_pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A `ThreadPoolExecutor`. On Linux the block ends after the operating system has ended its threads.

    Python joins a thread before the system runs the destructors of its thread-local values. OpenVINO has some in each thread that
    computed; where they run while its model is deleted, they abort the process ("std::system_error: Invalid argument").
    """
    ids: list[int] = []
    with ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=lambda: ids.append(get_native_id())) as pool:
        yield pool
    deadline = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < deadline and any((_TASKS / str(id_)).exists() for id_ in ids):
        time.sleep(POLL_S)
