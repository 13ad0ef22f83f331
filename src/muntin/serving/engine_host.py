"""The process that an engine runs in: it opens an artefact, and computes what the server asks of it.

    control   a question -> opened, or why not; then for each lane its connection, and the memory that its images will be in
    lane      what is to be computed of the images that lie there, and in which memory the answer is wanted -> done, or an error

A message is JSON of a length that stands before it, but for a call and for "done", which are a few numbers and a byte: an engine goes
through the caches, and after it a processor takes a tenth of a millisecond for as much of Python as a message of JSON needs. Images and
answers are in memory that both processes have mapped: images are copied once, answers not at all. Nothing is unpickled. The process ends
when the other end of `control` is gone, which is `engine_process`.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin import errors
from muntin.errors import MuntinError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.serving import version
from muntin.serving.scheduling import take_usual_turns
from muntin.serving.shared_memory import Places
from muntin.serving.version import Call, open_version

KEPT = 32 << 20
"""Bytes of images, or of an answer, beyond which a lane does not keep the memory that they were in."""
PLACES = 4
"""Memories of answers that a lane knows. Both ends forget the one that was used longest ago."""
MOST = 16 << 20
"""Bytes of a message."""
CALL = struct.Struct("=Biiiiqqq?")
"""An operation, B, H, W, C, bytes of the memory for images, number and bytes of that for the answer, and whether its file follows."""
SCORES, LABELS, OTHER = range(3)
"""Operations; `OTHER`: a message follows that says which."""
DONE, FAILED = b"d", b"f"
"""What an answer begins with; behind `FAILED`, or of another operation, a message follows."""
_LENGTH = struct.Struct("=I")
Compute = Callable[[NDArray[np.uint8]], NDArray[Any]]
_TEXT = 4000
"""Characters of an error's text that are passed on: an engine's may name every layer."""


def send(sock: socket.socket, message: Mapping[str, Any], *files: int) -> None:
    """`files`: descriptors for the other process."""
    text = json.dumps(message).encode()
    whole = memoryview(_LENGTH.pack(len(text)) + text)
    if files:
        whole = whole[socket.send_fds(sock, [whole], files) :]
    sock.sendall(whole)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A message and the files that came with it. None: the other end is gone."""
    try:
        head, files, _, _ = socket.recv_fds(sock, _LENGTH.size, 2)
        head += _exactly(sock, _LENGTH.size - len(head))
        (length,) = _LENGTH.unpack(head)
        if length > MOST:
            raise ValueError(f"a message of {length} bytes")
        return json.loads(_exactly(sock, length)), files
    except (EOFError, ConnectionError):
        return None


def _exactly(sock: socket.socket, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def call_of(values: list[Any]) -> Call:
    """A call, as JSON has it."""
    (B, H, W), labels = values
    return Call((B, H, W), labels)


def said_of(error: BaseException) -> dict[str, str]:
    """An error, for the other process to raise: `error_of` is the way back."""
    kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
    return {"error": kind, "text": str(error)[:_TEXT]}


def error_of(said: Mapping[str, str]) -> Exception:
    """What `said_of` said: muntin's errors and MemoryError as they were, others as RuntimeError, as which engines raise theirs."""
    if said["error"] == "MemoryError":
        return MemoryError(said["text"])
    for module in (errors, version):
        kind = getattr(module, said["error"], None)
        if isinstance(kind, type) and issubclass(kind, MuntinError):
            return kind(said["text"])
    return RuntimeError(said["text"] if said["error"] == "RuntimeError" else f"{said['error']}: {said['text']}")


# ---- in the process ----


def main() -> None:
    """Of a process whose standard input is `control`."""
    with socket.socket(fileno=os.dup(0)) as control:
        asked = receive(control)
        if asked is None:
            return
        take_usual_turns()  # the server's threads may have short ones, and this began as one of them
        try:
            session = _open(control, asked[0])
        except Exception as error:  # noqa: BLE001 - the other end raises it
            with suppress(OSError):
                send(control, said_of(error))
            return
        while (asked := receive(control)) is not None:
            calls, images = asked[1]
            Thread(target=_Lane(session, socket.socket(fileno=calls), images).serve, daemon=True).start()
        os._exit(0)  # at once, whatever an engine is at


def _open(control: socket.socket, question: dict[str, Any]) -> Session:
    for number in (signal.SIGINT, signal.SIGTERM):  # who ends all processes of a service at once means the server, which ends this one
        signal.signal(number, signal.SIG_IGN)
    end_after(question["seconds"])  # an engine that hangs sees nothing of the server's end
    _go_first(600)
    opened = open_version(
        Path(question["path"]),
        SessionOptions(**question["opening"]),
        [call_of(call) for call in question["lately"]],
        rest=question["rest"],
        stopped=lambda: bool(select.select([control], [], [], 0)[0]),  # nothing is sent meanwhile: its end is gone
    )
    end_after(0)
    _go_first(300)
    session = opened.session
    said = {name: getattr(session, name) for name in ("engine", "precision", "threads", "streams", "plan")}
    said |= {"signature": opened.signature.model_dump(mode="json"), "digest": opened.digest, "calls": opened.calls}
    session.outputs = Places()
    send(control, said)
    return session


def end_after(seconds: float) -> None:
    """Ends this process in so many seconds, whatever it is at then; 0: not any more. Nothing on Windows."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _go_first(much: int) -> None:
    """Where memory runs out the kernel is to end this process, and not the server, which begins another one; of two engines the one that
    is being opened. `much`: of 1,000 (proc(5), oom_score_adj)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(much), encoding="ascii")


class _Lane:
    """Computes one call after the other."""

    def __init__(self, session: Session, calls: socket.socket, images: int) -> None:
        self._session, self._calls, self._file = session, calls, images
        assert isinstance(session.outputs, Places)
        self._outputs = session.outputs
        self._images: NDArray[np.uint8] | None = None
        self._places: OrderedDict[int, mmap.mmap] = OrderedDict()

    def serve(self) -> None:
        try:
            self._serve()
        finally:
            self._calls.close()
            os.close(self._file)

    def _serve(self) -> None:
        while len(head := self._calls.recv(CALL.size, socket.MSG_WAITALL)) == CALL.size:
            operation, *rest = CALL.unpack(head)
            said: dict[str, Any] | None = None
            try:
                if operation == OTHER:
                    said = self._other()
                else:
                    self._compute(self._session.infer_labels if operation == LABELS else self._session.infer, *rest)
            except Exception as error:  # noqa: BLE001 - the other end raises it
                self._places.clear()  # as the other end does, which cannot know how far this came
                self._calls.sendall(FAILED)
                send(self._calls, said_of(error))
            else:
                self._calls.sendall(DONE)
                if said is not None:
                    send(self._calls, said)

    def _compute(self, call: Compute, B: int, H: int, W: int, C: int, size: int, number: int, room: int, follows: bool) -> None:
        if follows:
            _, (file,), _, _ = socket.recv_fds(self._calls, 1, 1)
            try:
                self._places[number] = mmap.mmap(file, room)
            finally:
                os.close(file)
        place = self._places[number]
        remember(self._places, number, room)
        images, self._images = self._images, None
        if images is None or images.nbytes != size:
            images = np.frombuffer(mmap.mmap(self._file, size), np.uint8)
        if size <= KEPT:
            self._images = images
        self._outputs.put(place)
        self._outputs.settle(call(images[: B * H * W * C].reshape(B, H, W, C)), place)

    def _other(self) -> dict[str, Any]:
        asked = receive(self._calls)
        if asked is None:
            raise EOFError
        question = asked[0]
        if question["op"] == "layers":
            return {"layers": [asdict(layer) for layer in self._session.layers()]}
        B, H, W = question["shape"]
        self._session.warm_up([(B, H, W)], labels=question["labels"], compute=question["compute"])
        return {}


def remember(places: OrderedDict[int, Any], number: int, size: int) -> None:
    """Of the answers' memories that a lane knows, what both of its ends keep after this one was used."""
    if next(reversed(places)) != number:
        places.move_to_end(number)
    if size > KEPT:
        del places[number]
    elif len(places) > PLACES:
        places.popitem(last=False)
