"""Messages between the server and the process of an engine (`child`), and the server's end of a channel.

    control   a question -> a description of the opened session, or an error; then for each channel its socket and its memory
    channel   a call, with its named arrays in that memory -> done, with the answer in it, or an error

A message is JSON, preceded by its length. A call is a few numbers and "done" is a byte, because JSON takes a tenth of a millisecond.
The memory is a file without a name, in memory where the system has such files. It is not a file of /dev/shm, of which a container has
64 MB. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.runtime.buffers import Buffers
from muntin.runtime.host.helper_process import recorded_error
from muntin.runtime.inputs import Dims, Named
from muntin.serving.worker.named_arrays import NamedCalls, views, write_arrays

KEPT_BYTES = 64 << 20
"""Bytes of memory that a channel keeps between calls. Larger memory is freed after its call."""
MESSAGE_BYTES = 16 << 20
"""Maximum length of a message, bytes."""
CALL = struct.Struct("=Biq")
"""Operation, bytes of the call's numbers, which follow (`named_arrays`), and bytes of the memory.

Of `WARM_UP` and `COMPILE` nothing is in the memory: its bytes are 0.
"""
COMPUTE, WARM_UP, COMPILE, ASK = range(4)
"""Operations: compute inputs; warm up; the same without computing; only answer."""
DONE, FAILED = b"d", b"f"
"""First byte of an answer. After `FAILED` a message with the error follows."""
_LENGTH = struct.Struct("=I")
_LEAST_BYTES = 1 << 16


def send(sock: socket.socket, message: Mapping[str, Any], *files: int) -> None:
    """Send a message, and file descriptors for the other process."""
    text = json.dumps(message).encode()
    rest = memoryview(_LENGTH.pack(len(text)) + text)
    if files:
        rest = rest[socket.send_fds(sock, [rest], files) :]
    sock.sendall(rest)


def receive(sock: socket.socket, begun: bytes = b"") -> tuple[dict[str, Any], list[int]] | None:
    """Receive a message, of which `begun` has been received, and the file descriptors sent with it. None if the other end is closed."""
    try:
        head, files = (begun, []) if begun else socket.recv_fds(sock, _LENGTH.size, 2)[:2]
        head += receive_exactly(sock, _LENGTH.size - len(head))
        (length,), text = _LENGTH.unpack_from(head), head[_LENGTH.size :]
        if length > MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return json.loads(text + receive_exactly(sock, length - len(text))), files
    except (EOFError, ConnectionError):
        return None


def receive_exactly(sock: socket.socket, length: int) -> bytes:
    """Receive so many bytes. Raises EOFError if the other end is closed before."""
    parts = b""
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _new_file() -> int:
    """Return a descriptor of an empty file without a name."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a sandbox may not allow it
            return os.memfd_create("muntin")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def mapped(file: int, size: int) -> NDArray[np.uint8]:
    """Return the first `size` bytes of a file as an array, shared with other processes."""
    return np.frombuffer(mmap(file, size), np.uint8)


def _copied(array: NDArray[Any], buffers: Buffers) -> NDArray[Any]:
    copy = buffers.take(array.shape, array.dtype) if array.size else np.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


class EngineChannel:
    """A connection to the process of an engine, for one call at a time, and memory that both processes have mapped.

    `asked_at`: when the process was asked (`time.monotonic`); inf once it has answered. Until then the channel may not be used again.
    """

    def __init__(self, control: socket.socket) -> None:
        self.asked_at = inf
        self._memory: NDArray[np.uint8] | None = None
        self._file = -1
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._file = _new_file()
            send(control, {}, theirs.fileno(), self._file)

    def check(self) -> None:
        """Wait for an answer. Raises EOFError or ConnectionError if the process has ended, and the error raised there."""
        self._ask(ASK)

    def warm_up(self, calls: NamedCalls, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        """Have the engine compile for sizes of free dimensions. Raises as `check` does."""
        self._ask(WARM_UP if compute else COMPILE, calls.layout(dims, tuple(outputs)).call)

    def compute(self, calls: NamedCalls, inputs: Named, dims: Dims, outputs: Sequence[str], buffers: Buffers) -> Named:
        """Have named arrays computed. The results are copied into memory of `buffers`. Raises as `check` does."""
        layout = calls.layout(dims, tuple(outputs))
        memory = self._memory_of(layout.end)
        write_arrays(inputs, layout.inputs, memory)
        try:
            answer = self._ask(COMPUTE, layout.call, memory.nbytes, answer_length=len(layout.answer))
            places, end = calls.read_answer(layout, answer)
            if end > memory.nbytes:  # the process has made the file longer for outputs whose size was not known
                self._memory = memory = mapped(self._file, end)
            return {name: _copied(array, buffers) for name, array in views(places, memory).items()}
        finally:
            self._free(memory)

    def _ask(self, operation: int, call: bytes = b"", size: int = 0, *, answer_length: int = 0) -> bytes:
        self.asked_at = time.monotonic()
        self._socket.sendall(CALL.pack(operation, len(call), size) + call)
        answer = self._socket.recv(1 + answer_length)
        state, answer = answer[:1], answer[1:]
        failure = receive(self._socket, answer) if state == FAILED else None
        if state != DONE and failure is None:
            raise EOFError
        if failure is None:
            answer += receive_exactly(self._socket, answer_length - len(answer))
        self.asked_at = inf
        if failure is not None:
            raise recorded_error(failure[0])
        return answer

    def _free(self, memory: NDArray[np.uint8]) -> None:
        """Free memory after its call, unless it is small."""
        if memory.nbytes > KEPT_BYTES:
            self._memory = None
            os.ftruncate(self._file, 0)

    def _memory_of(self, size: int) -> NDArray[np.uint8]:
        """Return memory of at least `size` bytes."""
        if self._memory is None or self._memory.nbytes < size:
            if size <= KEPT_BYTES:
                size = max(_LEAST_BYTES, 1 << (size - 1).bit_length())
            self._memory = None
            os.ftruncate(self._file, size)
            self._memory = mapped(self._file, size)
        return self._memory

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()
