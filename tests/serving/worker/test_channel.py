"""Messages between the server and the process of an engine."""

from __future__ import annotations

import socket

import pytest

from muntin.serving.worker.channel import receive, receive_exactly, send
from muntin.serving.worker.remote_session import can_open_remote

pytestmark = pytest.mark.skipif(not can_open_remote(), reason="no file descriptors can be sent here")


@pytest.mark.parametrize("begun", [0, 1, 4, 5, 23])
def test_message_of_which_some_is_received(begun: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, {"error": "no memory"})  # 4 bytes of length, and 22
        assert receive(ours, receive_exactly(ours, begun)) == ({"error": "no memory"}, [])


def test_message_that_ends_early() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            send(theirs, {"error": "no memory"})
        assert receive(ours, receive_exactly(ours, 5)) is not None
        assert receive(ours, b"\x04\x00\x00\x00{") is None
