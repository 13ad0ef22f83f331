"""The floor: a server that reads a request of a known size and writes bytes that lie ready, on blocking sockets and nothing else.

    python echo.py PORT REQUEST_BYTES ANSWER_FILE

What it takes at concurrency 1 is what any server takes for bytes of that size, before it has looked at one of them.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path


def serve(port: int, request_bytes: int, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                exchange(connection, memoryview(bytearray(request_bytes)), answer)


def exchange(connection: socket.socket, buffer: memoryview, answer: bytes) -> None:
    while True:
        filled = 0
        while filled < len(buffer):
            count = connection.recv_into(buffer[filled:])
            if count == 0:
                return
            filled += count
        connection.sendall(answer)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).read_bytes())
