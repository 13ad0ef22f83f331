"""A transport over TLS that says how much it has to send.

asyncio's encrypts at once whatever it is given, and hands that on to a transport below it, which nobody can ask: a client that reads
nothing could have the server hold any number of answers, and what is closed while it is read is cut off. So it is given a piece only when
it has sent those before, and what waits lies here, as it was given.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

_PIECE = 1 << 16


class Writer(Protocol):
    """Who is told when a transport has more to send than it likes, when no longer, and when it is gone."""

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...


class Paced:
    """In the place of `transport`, whose protocol has this one's `pause_writing`, `resume_writing` and `connection_lost`. As the transport,
    but for what concerns writing."""

    def __init__(self, transport: asyncio.Transport, writer: Writer) -> None:
        self._transport, self._writer = transport, writer
        self._pieces: deque[memoryview] = deque()
        self._waiting = 0
        """Their bytes."""
        self._full = self._told = self._closing = False
        """The transport takes nothing for now; the writer knows that too much waits; it is closed behind what waits."""
        self._high, self._low = 1 << 16, 1 << 14

    def begin(self) -> None:
        """To be called first, and not before the protocol has the methods: what is left of the handshake may fill the transport at once."""
        self._transport.set_write_buffer_limits(high=1, low=0)  # it has something left only where the one below it is full

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    # ---- for the writer ----

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        if not self._pieces and not self._full and len(data) <= _PIECE:
            self._transport.write(data)
        elif len(data):
            self._pieces.append(memoryview(data).cast("B"))
            self._waiting += len(self._pieces[-1])
            self._send()
        self._tell()

    def get_write_buffer_size(self) -> int:
        return self._waiting + self._transport.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self._high, self._low = high, low
        self._tell()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._send()
        if self._pieces:
            self.set_write_buffer_limits(high=0, low=0)  # the writer is to hear of their end

    def abort(self) -> None:
        self._closing = True
        self._drop()
        self._transport.abort()

    # ---- for the transport ----

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop()
        self._writer.connection_lost(exc)

    def _send(self) -> None:
        if self._transport.is_closing():
            self._drop()
        while self._pieces and not self._full:
            piece = self._pieces.popleft()
            if len(piece) > _PIECE:
                self._pieces.appendleft(piece[_PIECE:])
                piece = piece[:_PIECE]
            self._waiting -= len(piece)
            self._transport.write(piece)
        if self._closing and not self._pieces:
            self._transport.close()

    def _drop(self) -> None:
        self._pieces.clear()
        self._waiting = 0

    def _tell(self) -> None:
        size = self.get_write_buffer_size()
        if size > self._high and not self._told:
            self._told = True
            self._writer.pause_writing()
        elif size <= self._low and self._told:
            self._told = False
            self._writer.resume_writing()
