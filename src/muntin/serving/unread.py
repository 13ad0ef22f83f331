"""What one client has not read of its answers: it is counted as held, and a client that stands still is given up.

How much a transport has to send is known to it alone, so this asks it; whoever reads steadily may take as long as it likes, while there is
room for others (`Ledger.has_room`).

TLS wants to hear of a connection's end from both sides, and many a client looks no more at one that it does not use: what is closed is left
as soon as all of it has reached the client. The transport of TLS does not say what little is left below it (`paced`): the system is asked.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.serving.ledger import Ledger

if sys.platform == "linux":
    import fcntl
    import termios

SMALL = 1 << 14
"""Bytes of an answer below which its parts are put together: copying them costs less than sending them one by one. Whoever is sent more
and has not taken it counts as one who reads slowly."""

_FAREWELL_S = 0.25
"""Between two looks at what of a closed connection over TLS is on its way."""


class Unread:
    """Of one connection. `end` is called once, when nothing was read for `Bounds.body_seconds`, or what it holds is wanted by others."""

    def __init__(self, transport: asyncio.Transport, ledger: Ledger, loop: asyncio.AbstractEventLoop, end: Callable[[], object]) -> None:
        self._transport, self._ledger, self._loop, self._end = transport, ledger, loop, end
        self._secure = transport.get_extra_info("sslcontext") is not None
        self._timer: asyncio.TimerHandle | None = None
        """When it is looked whether anything has been read."""
        self._waiting = 0
        """Bytes that were not, when it was looked last."""
        self._owed = 0
        """Bytes of answers that the ledger holds."""
        self._arrays: Sequence[NDArray[Any]] = ()
        """Of what such answers are parts: where a batch had several requests, the answer to all of it is kept by the slowest."""
        transport.set_write_buffer_limits(high=SMALL, low=0)  # what waits is known, and when none does any more

    def stalled(self) -> None:
        """The transport has more to send than it likes."""
        self._watch()
        self._owe(self._waiting)

    def taken(self) -> None:
        """The transport has sent all it had, or it is gone."""
        self._stop()
        self._owe(0)

    def give_up(self) -> None:
        """As the ledger's `Reader`."""
        self.taken()
        self._end()

    def closing(self) -> None:
        """A connection that is closed stays until its client has read the rest, as long as it reads."""
        if self._timer is None and self._transport.get_write_buffer_size():
            self._watch()
        elif self._timer is None and self._secure:
            self._timer = self._loop.call_later(_FAREWELL_S, self._leave, False)

    def overflows(self) -> bool:
        """Has the transport say that it has something left to send, however little: it may be a part of much."""
        if not self._transport.get_write_buffer_size():
            return False
        self._transport.set_write_buffer_limits(high=0, low=0)
        self._transport.set_write_buffer_limits(high=SMALL, low=0)
        return True

    def keep(self, parts: Sequence[Any]) -> None:
        """These parts of an answer were written, and not all of them were taken."""
        self._watch()  # since one of the parts it knew of those before
        arrays = [array for part in parts if (array := _whole(part)) is not None]
        own = sum(len(part) for part in parts if _whole(part) is None)
        self._owe(min(own, self._transport.get_write_buffer_size()), arrays)

    def _owe(self, count: int, arrays: Sequence[NDArray[Any]] = ()) -> None:
        """What of answers waits to be read: so many bytes, and parts of these arrays, all of which stay until then."""
        self._ledger.held += count - self._owed
        for array in arrays:
            self._ledger.keep(array)
        for array in self._arrays:
            self._ledger.let_go(array)
        self._owed, self._arrays = count, arrays
        self._ledger.readers.pop(self, None)
        if count or arrays:  # the last one now: since its newest answer
            self._ledger.readers[self] = time.monotonic()

    def _watch(self) -> None:
        self._stop()
        self._waiting = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(self._ledger.bounds.body_seconds, self._look)

    def _look(self) -> None:
        if 0 < self._transport.get_write_buffer_size() < self._waiting:  # slowly, but it reads; what it holds counts
            self._watch()
            return
        self._timer = None
        self._end()

    def _leave(self, before: bool) -> None:
        """`before`: nothing was on its way at the last look; that may be since the loop had no time to send more."""
        delivered = _delivered(self._transport)
        if before and delivered:
            self._timer = None
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(_FAREWELL_S, self._leave, delivered)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _delivered(transport: asyncio.Transport) -> bool:
    """Whether the client's system has all that this one was given to send. False where the system does not say."""
    if sys.platform != "linux" or (socket := transport.get_extra_info("socket")) is None:
        return False
    with suppress(OSError):
        return not any(fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)))
    return False


def _whole(part: Any) -> NDArray[Any] | None:
    """The array that a part of an answer keeps in memory. None where it is no part of one."""
    array = part.obj if isinstance(part, memoryview) else None
    while isinstance(array, np.ndarray) and isinstance(array.base, np.ndarray):
        array = array.base
    return array if isinstance(array, np.ndarray) else None
