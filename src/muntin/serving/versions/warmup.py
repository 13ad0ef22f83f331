"""Compile for the sizes that come often, while requests go on.

A session that was opened with `dynamic` computes a size that it was not compiled for 1.2 to 1.7 times slower. After a few batches of a size
it is compiled for: first by another process of low priority, which leaves the compiled model in the user's cache, then by the engine that
serves, which only has to read it. A compiled model takes memory by its pixels. Clients choose the sizes, so their sum is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from threading import Event, Lock

from muntin.runtime.options import SessionOptions
from muntin.serving.threads import Threads
from muntin.serving.versions.trial import probe
from muntin.serving.versions.version import Version
from muntin.serving.worker.opening import Call, open_version

OFTEN = 8
"""Batches of a size after which it is compiled for."""
COMPILED = 48
"""Maximum number of sizes that a version is compiled for beside those of its start."""
END_S = 5.0
"""Seconds that `close` waits."""
BUDGET = 4
"""Pixels that a version may be compiled for beside those of the start, in multiples of the largest request."""


class Compiler:
    """Compiles for the sizes of which a version remembers `OFTEN` batches, one after the other.

    `options`: those of the versions. `budget`: pixels (rows x height x width) for a version of so many channels, summed over the
    sizes that it is compiled for beside those of its start.
    """

    def __init__(self, options: SessionOptions, *, budget: Callable[[int], float] = lambda channels: inf) -> None:
        self._options, self._budget = options, budget
        self._lock = Lock()
        self._threads = Threads("muntin-compile", most=1)
        self._closed = Event()

    def note(self, version: Version, call: Call) -> None:
        """Compile for the size of a batch that was counted, if it comes often. Takes microseconds."""
        if call in version.warm or version.latencies.count(call) < OFTEN:
            return
        with self._lock:
            beside = version.warm - version.start
            pixels = sum(other.pixels for other in beside) + call.pixels
            if call in beside or len(beside) >= COMPILED or pixels > self._budget(version.signature.channels):
                return
            version.warm |= {call}  # also if it fails: it is tried once
        with suppress(RuntimeError):  # this process may have no more threads
            self._threads.submit(self._compile, version, call)

    def close(self) -> None:
        """End the process and the thread, but do not wait for an engine that hangs."""
        self._closed.set()
        self._threads.give_up()
        self._threads.join(END_S)

    def _compile(self, version: Version, call: Call) -> None:
        if self._closed.is_set() or not version.open or version.state == "failed":
            return
        with suppress(Exception):  # no request fails: the size is computed as before
            probe(version.path, self._options, [call], stopped=self._closed.is_set, examine=open_version)
            version.session.warm_up([call.shape], labels=call.labels)
