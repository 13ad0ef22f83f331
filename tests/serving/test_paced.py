"""A transport that says how much it has to send: what is written through one arrives, in order, and nobody is told twice.

test_server.py has the real ones, over TLS.
"""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from muntin.serving.paced import Paced


class Below:
    """A transport that is full with so many bytes until they are taken."""

    def __init__(self, room: int) -> None:
        self.room, self.full, self.closed = room, False, False
        self.sent = b""
        self.held = 0
        self.paced: Paced

    def set_write_buffer_limits(self, *, high: int, low: int) -> None:
        if self.held > high and not self.full:  # as uvloop's does, with what is left of the handshake
            self.full = True
            self.paced.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.held if self.full else 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data
        self.held += len(data)
        if self.held > self.room and not self.full:
            self.full = True
            self.paced.pause_writing()

    def take(self) -> None:
        self.held = 0
        if self.full:
            self.full = False
            self.paced.resume_writing()


class Told:
    def __init__(self) -> None:
        self.paused, self.lost = False, 0

    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


def pair(room: int, handshake: int = 0) -> tuple[Paced, Below, Told]:
    below, told = Below(room), Told()
    below.held = handshake
    paced = below.paced = Paced(cast(Any, below), told)
    paced.begin()
    paced.set_write_buffer_limits(high=1 << 14, low=0)
    return paced, below, told


@given(
    sizes=st.lists(st.one_of(st.just(-1), st.integers(0, 300_000)), max_size=12),
    room=st.integers(0, 200_000),
    handshake=st.sampled_from([0, 0, 1, 255]),
)
def test_all_arrives_in_order_and_it_closes_behind_it(sizes: list[int], room: int, handshake: int) -> None:
    """-1: what is below has sent what it had."""
    paced, below, told = pair(room, handshake)
    wanted = b""
    for number, size in enumerate(sizes):
        if size < 0:
            below.take()
            continue
        data = bytes([number]) * size
        paced.write(data)
        wanted += data
        assert paced.get_write_buffer_size() - below.get_write_buffer_size() == len(wanted) - len(below.sent)
        assert told.paused or paced.get_write_buffer_size() <= 1 << 14
        assert below.held <= max(room, handshake) + (1 << 16)
    paced.close()
    paced.write(b"too late")
    assert paced.is_closing()
    while not below.closed:
        assert told.paused
        below.take()
    assert below.sent == wanted
    below.take()
    assert not told.paused


def test_of_what_is_cut_off_nothing_is_kept() -> None:
    for end in ("abort", "lost"):
        paced, below, told = pair(0)
        paced.write(bytes(1_000_000))
        assert paced.get_write_buffer_size() == 1_000_000
        if end == "abort":
            paced.abort()
        else:
            paced.connection_lost(None)
            assert told.lost == 1
        assert paced.get_write_buffer_size() == below.get_write_buffer_size() < 100_000
