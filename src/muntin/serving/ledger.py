"""What all connections of one server hold together, and what they share."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from typing import Any, Protocol

from numpy.typing import NDArray

from muntin.runtime.buffers import Buffers
from muntin.serving.config import Bounds
from muntin.serving.heads import KnownHeads

_ASLEEP = 0.0002
"""Seconds between two rounds of a loop from which on it slept."""
_READ = 1 << 16
"""Bytes that are read at once where it is not known yet what comes."""


class Pulse:
    """When the bytes that a loop reads came. A loop reads in rounds, and one that does not sleep between them reads what may have come at
    any time since it looked last: at many requests a second that is far more than what a request is worth. One that slept may have been
    woken long before it runs, where the engine has its core: Linux counts how long a thread that could run had none.

    Every round of reading (`came`) or answering (`ran`) is told to it, on the loop's thread, also where nobody asks: what was waited for
    before says nothing of now.
    """

    def __init__(self) -> None:
        self._reading: float | None = None
        """Since when the present round of reading goes on."""
        self._answering: float | None = None
        """Since when the present round does something else, of which no reading has been told before."""
        self._before = self._looked = self._came = -1.0
        self._waits: Waits | None = None
        self._waited = 0.0
        """For a core, when it looked last."""

    def came(self, loop: asyncio.AbstractEventLoop) -> float:
        """For bytes that were just read: since when they may have been there, of `time.monotonic`."""
        if self._reading is None:
            now = time.monotonic()
            if self._answering is not None:  # what is read in a round was there when it began
                self._came = now = self._answering
            elif now - self._looked < _ASLEEP:
                self._came = self._before
            elif self._waits is None:
                self._came = now
            else:
                self._came = now - min(max(self._waits.seconds() - self._waited, 0.0), now - self._looked)
            self._reading = now
            loop.call_soon(self._read)
        return self._came

    def ran(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop does something else than reading, an answer as a rule. What it waited for to do that, no request has waited for that is
        read in a later round."""
        if self._reading is None and self._answering is None:
            self._answering = time.monotonic()
            loop.call_soon(self._answered)

    def _answered(self) -> None:
        """The round is over."""
        assert self._answering is not None
        self._before, self._answering = self._answering, None
        self._count()
        self._looked = time.monotonic()

    def _read(self) -> None:
        """The round is over."""
        assert self._reading is not None
        self._before, self._reading = self._reading, None
        if self._waits is None:
            self._waits = Waits()
        self._count()
        self._looked = time.monotonic()

    def _count(self) -> None:
        if self._waits is not None:
            self._waited = self._waits.seconds()


class Waits:
    """How long the thread that made it has waited for a core so far, while it could run. Always 0 where the system does not say."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None
        else:
            weakref.finalize(self, os.close, self._file)

    def seconds(self) -> float:
        """Costs a microsecond or two."""
        if self._file is None:
            return 0.0
        try:
            return int(os.pread(self._file, 96, 0).split()[1]) / 1e9  # time on a core, time without one, turns
        except (OSError, ValueError, IndexError):  # the thread has ended
            return 0.0


class Reader(Protocol):
    """A client that has not read all of an answer."""

    def give_up(self) -> None:
        """Ends its connection. What it holds is free when this returns."""
        ...


class Ledger:
    """What the connections of one server hold together."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.buffers = Buffers()
        self.pulse = Pulse()
        self.scratch = memoryview(bytearray(_READ))
        """Where heads are read to, of any connection: they are taken out before anything else is read."""
        self.held = 0
        """Bytes of bodies that are being received or answered, and of answers that their clients do not read."""
        self.refused: dict[int, int] = {}
        """Requests that no application saw, by status."""
        self.known = KnownHeads()
        """Heads of requests for the short way."""
        self.readers: dict[Reader, float] = {}
        """Who has not read all of an answer, and since when (`time.monotonic`), those that began first before others."""
        self._kept: dict[int, tuple[NDArray[Any], int]] = {}
        """Arrays by their identity, and how many connections keep each."""

    def has_room(self, count: int) -> bool:
        """Whether so many bytes more may be held.

        For nothing there is always room. Where there is none for more, it is made: clients that have been reading an answer for longer than
        `Bounds.body_seconds` are given up, who began first before others. As long as there is room, who reads may read slowly; it must not
        keep everybody else out.
        """
        while count and self.held + count > self.bounds.held_bytes:
            reader, since = next(iter(self.readers.items()), (None, 0.0))
            if reader is None or time.monotonic() - since < self.bounds.body_seconds:
                return False
            del self.readers[reader]
            reader.give_up()
        return True

    def keep(self, array: NDArray[Any]) -> None:
        """Counts all of an array as held: a part is still to be sent. It counts once, though several clients' answers are parts of it."""
        kept, count = self._kept.get(id(array), (array, 0))
        self._kept[id(array)] = kept, count + 1
        self.held += 0 if count else array.nbytes

    def let_go(self, array: NDArray[Any]) -> None:
        """The opposite of `keep`."""
        kept, count = self._kept.pop(id(array))
        if count > 1:
            self._kept[id(array)] = kept, count - 1
        else:
            self.held -= array.nbytes
