"""Compile for the sizes that come often, while requests go on.

A session that was opened with `dynamic` computes a size that it was not compiled for 1.2 to 1.7 times slower. After a few batches of a size
it is compiled for: first by another process of low priority, which leaves the compiled model in the user's cache, then by the engine that
serves, which only has to read it. (The threads that an engine starts keep the priority of the thread that compiled, so compiling there at a
low priority would make all later answers slow.)

A compiled model stays, and takes memory by its pixels. Clients choose the sizes, so the sum of their pixels is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from weakref import WeakKeyDictionary

from muntin.runtime.options import SessionOptions
from muntin.serving.threads import Threads
from muntin.serving.versions.loader import endless
from muntin.serving.versions.trial import OpeningLimits, TrialResult, probe
from muntin.serving.versions.version import Version
from muntin.serving.worker.opening import Call, open_version

OFTEN = 8
"""Batches of a size after which it is compiled for."""
COMPILED = 48
"""Maximum number of sizes that a version is compiled for, and of sizes that are counted."""
END_S = 5.0
"""Seconds that `close` waits."""
BUDGET = 4
"""Pixels that a version may be compiled for beside those of the start, in multiples of the largest request."""


@dataclass
class _Sizes:
    """Sizes of one version: batches counted, and sizes compiled for, whether it has succeeded or not."""

    counts: OrderedDict[Call, int] = field(default_factory=OrderedDict)
    compiled: set[Call] = field(default_factory=set)

    def count(self, call: Call) -> int:
        """Count a batch; return how many of its size were counted. Forgets the size that was counted longest ago."""
        self.counts[call] = self.counts.get(call, 0) + 1
        self.counts.move_to_end(call)
        if len(self.counts) > COMPILED:
            self.counts.popitem(last=False)
        return self.counts[call]


class Compiler:
    """Counts batches by size, and compiles for those that come often, one after the other.

    `options`: those of the versions. `budget`: pixels (rows x height x width) for a version of so many channels, summed over the
    sizes that it is compiled for beside those of its start.
    """

    def __init__(self, options: SessionOptions, *, budget: Callable[[int], float] = endless) -> None:
        self._options, self._budget = options, budget
        self._lock = Lock()
        self._sizes: WeakKeyDictionary[Version, _Sizes] = WeakKeyDictionary()
        self._threads = Threads("muntin-compile", most=1)
        self._closed = Event()

    def note(self, version: Version, call: Call) -> None:
        """Count a batch, and compile for its size after the `OFTEN`th. Takes microseconds."""
        if call in version.warm:
            return
        with self._lock:
            sizes = self._sizes.setdefault(version, _Sizes())
            if sizes.count(call) != OFTEN or not self._granted(version, sizes, call):
                return
            sizes.compiled.add(call)
        with suppress(RuntimeError):  # this process may have no more threads
            self._threads.submit(self._compile, version, call)

    def _granted(self, version: Version, sizes: _Sizes, call: Call) -> bool:
        if call in sizes.compiled:  # it was forgotten among others, and counted again
            return False
        beside = sizes.compiled | (version.warm - version.start)  # the latter: calls of its predecessor
        pixels = sum(other.pixels for other in beside) + call.pixels
        return len(sizes.compiled) < COMPILED and pixels <= self._budget(version.signature.channels)

    def close(self) -> None:
        """End the process and the thread, but do not wait for an engine that hangs."""
        self._closed.set()
        self._threads.give_up()
        self._threads.join(END_S)

    def _compile(self, version: Version, call: Call) -> None:
        if self._closed.is_set() or not version.open or version.state == "failed":
            return
        with suppress(Exception):  # no request fails: the size is computed as before
            probe(version.path, self._options, [call], limits=OpeningLimits(), stopped=self._closed.is_set, examine=compile_for)
            version.session.warm_up([call.shape], labels=call.labels)


def compile_for(path: Path, options: SessionOptions, lately: tuple[Call, ...]) -> TrialResult:
    """Open an artefact and warm it up, which leaves the compiled models in the user's cache."""
    opened = open_version(path, options, lately)
    return TrialResult(digest=opened.digest, signature=opened.signature)
