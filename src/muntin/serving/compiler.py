"""Compiling for the sizes that come often, while requests go on.

A session that was opened with `dynamic` computes a size that nobody foresaw as it comes, 1.2 to 1.7 times slower. After a few of them it is
compiled for: first by another process of low priority, which leaves what it compiled in the user's cache, then here, where it only has to
be read. The threads that an engine starts keep the priority of whoever compiled, so a thread of low priority here would answer slowly for
ever.

What is compiled stays, and takes memory by its pixels. Clients choose the sizes, so their sum is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from weakref import WeakKeyDictionary

from muntin.runtime.options import SessionOptions
from muntin.serving.probation import Limits, Probation, endless, probe
from muntin.serving.scheduling import Demand, nobody
from muntin.serving.version import Call, Version, open_version

OFTEN = 8
"""Batches of one size after which it is compiled for."""
COMPILED = 48
"""Sizes that a version is compiled for at most, and sizes that are counted."""
END_S = 5.0
"""That the thread is waited for at the end."""
BUDGET = 4
"""Times the largest single request: the pixels that a version may be compiled for beside those of the start."""


class Compiler:
    """Counts batches by size, and compiles for those that come often, one after the other.

    `opening`: as the versions were opened. `budget`: pixels (rows x height x width) for a version of so many channels, summed over the
    sizes that it is compiled for beside those of its start; what would go beyond it is computed as it comes. `demand`: who is served now,
    whom compiling is not to keep waiting.
    """

    def __init__(self, opening: SessionOptions, *, budget: Callable[[int], float] = endless, demand: Callable[[], Demand] = nobody) -> None:
        self._opening, self._budget, self._demand = opening, budget, demand
        self._lock = Lock()
        # By version, and not by what it is of: an artefact that is loaded again is compiled for nothing of this.
        self._seen: WeakKeyDictionary[Version, OrderedDict[Call, int]] = WeakKeyDictionary()
        self._compiled: WeakKeyDictionary[Version, set[Call]] = WeakKeyDictionary()
        """For which sizes."""
        self._failed: WeakKeyDictionary[Version, set[Call]] = WeakKeyDictionary()
        """Sizes for which it could not be compiled once. It is tried again when they have come as often again, and then no more."""
        self._queue: SimpleQueue[tuple[Version, Call] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = Event()

    def note(self, version: Version, call: Call) -> None:
        """Counts a batch; the `OFTEN`th of its size is the reason to compile for it. Takes microseconds."""
        if call in version.warm:
            return
        with self._lock:
            seen = self._seen.setdefault(version, OrderedDict())
            seen[call] = seen.get(call, 0) + 1
            seen.move_to_end(call)
            if len(seen) > COMPILED:
                seen.popitem(last=False)
            if seen[call] != OFTEN or not self._granted(version, call):
                return
            if self._thread is None:
                thread = Thread(target=self._run, name="muntin-compile", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # this process may have no more threads; it is tried again when the size has come as often again
                    self._compiled[version].discard(call)
                    del seen[call]
                    return
                self._thread = thread
        self._queue.put((version, call))

    def _granted(self, version: Version, call: Call) -> bool:
        compiled = self._compiled.setdefault(version, set())
        if call in compiled:  # it came often, was forgotten among others that came once, and comes often again
            return False
        beside = compiled | (version.warm - version.start)  # the latter: what its predecessor was asked
        if len(compiled) >= COMPILED or sum(one.pixels for one in beside) + call.pixels > self._budget(version.signature.channels):
            return False
        compiled.add(call)
        return True

    def close(self) -> None:
        """Ends what it is at, and its thread, but does not wait for an engine that hangs."""
        self._closed.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(END_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._closed.is_set():
            version, call = item
            try:
                if version.open and version.state != "failed":  # else it went while it waited
                    self._compile(version, call)
            except Exception:  # noqa: BLE001 - it failed for nobody: the size is computed as before, and the next one is compiled
                self._forget(version, call)
            del version, item

    def _compile(self, version: Version, call: Call) -> None:
        probe(
            version.path, self._opening, [call],
            limits=Limits(niceness=19), stopped=self._closed.is_set, demand=self._demand, examine=compile_for,
        )  # fmt: skip
        version.session.warm_up([call.shape], labels=call.labels)

    def _forget(self, version: Version, call: Call) -> None:
        """A size was not compiled for."""
        with self._lock:
            failed = self._failed.setdefault(version, set())
            if call not in failed:
                failed.add(call)
                self._compiled[version].discard(call)
                self._seen[version].pop(call, None)


def compile_for(path: Path, opening: SessionOptions, lately: tuple[Call, ...]) -> Probation:
    """Opens an artefact and warms it up, which leaves what was compiled in the user's cache. What a `Compiler` asks of its process."""
    opened = open_version(path, opening, lately)
    return Probation(digest=opened.digest, signature=opened.signature, open_s=0.0, latency_ms={}, peak_mib=None)
