"""The process that an engine runs in: it opens an artefact, and computes what the server asks for (messages: `channel`).

It ends when the server closes its end of the control socket.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.errors import MuntinError
from muntin.runtime.host.helper_process import error_record, helper_socket
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.serving.worker.calls import call_from_json
from muntin.serving.worker.channel import ASK, CALL, COMPUTE, DONE, FAILED, KEPT_BYTES, WARM_UP, mapped, receive, receive_exactly, send
from muntin.serving.worker.named_arrays import NamedCalls, views, write_arrays
from muntin.serving.worker.opening import Opened, open_version
from muntin.serving.worker.turns import end_with_parent

OOM_SCORE_OPENING, OOM_SCORE_SERVING = 1000, 300
"""Linux's oom_score_adj (proc(5), of 1,000): if memory runs out, the kernel ends this process and not the server, which starts another
one; of two engines, the one that is being opened."""


def main() -> None:
    """Run the process. Its standard input is the control socket."""
    with helper_socket() as control:
        received = receive(control)
        if received is None:
            return
        try:
            opened = _open(control, received[0])
        except Exception as error:  # noqa: BLE001 - the server raises it
            with suppress(OSError):
                send(control, error_record(error))
            return
        Thread(target=_compile, args=(opened.compile_rest,), daemon=True).start()
        while (received := receive(control)) is not None:
            number, file = received[1]
            channel = _HostChannel(opened.session, socket.socket(fileno=number), file)
            Thread(target=channel.serve, daemon=True).start()
        os._exit(0)  # at once, whatever the engine does


def _open(control: socket.socket, question: dict[str, Any]) -> Opened:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service: the server ends this one
        signal.signal(number, signal.SIG_IGN)
    end_after(question["seconds"])  # an engine that hangs does not see that the server has ended
    end_with_parent(signal.SIGKILL)  # nor does a process that is stopped (`turns`)
    set_oom_score(OOM_SCORE_OPENING)
    opened = open_version(
        Path(question["path"]),
        SessionOptions(**question["options"]),
        [call_from_json(call) for call in question["calls"]],
        digest=question["digest"],
        verify=question["verify"],
        hurry=question["hurry"],
        progress=lambda step: send(control, {"progress": step}),
    )
    end_after(0)
    end_with_parent(0)
    set_oom_score(OOM_SCORE_SERVING)
    session = opened.session
    description = {name: getattr(session, name) for name in ("engine", "precision", "threads", "streams")}
    description |= {"signature": opened.signature.model_dump(mode="json"), "digest": opened.digest, "calls": opened.calls}
    send(control, description)
    return opened


def _compile(compile_rest: Callable[[], None]) -> None:
    with suppress(MuntinError, MemoryError):  # what is not compiled for is computed in smaller batches
        compile_rest()


def end_after(seconds: float) -> None:
    """End this process after so many seconds, whatever it does; 0: do not. Nothing on Windows."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def set_oom_score(score: int) -> None:
    """Set how much sooner than others, of 1,000, the kernel ends this process if memory runs out. Linux only."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")


class _HostChannel:
    """This process's end of a channel. It computes one call after the other."""

    def __init__(self, session: Session, sock: socket.socket, file: int) -> None:
        self._session, self._calls = session, NamedCalls(session.signature)
        self._socket, self._file = sock, file
        self._memory: NDArray[np.uint8] | None = None

    def serve(self) -> None:
        longest = CALL.size + self._calls.longest_call
        try:
            while head := self._socket.recv(longest):
                head += receive_exactly(self._socket, CALL.size - len(head))
                operation, length, size = CALL.unpack_from(head)
                call = head[CALL.size :]
                self._answer(operation, call + receive_exactly(self._socket, length - len(call)), size)
        except EOFError:
            pass
        finally:
            self._socket.close()
            os.close(self._file)

    def _answer(self, operation: int, call: bytes, size: int) -> None:
        try:
            answer = self._compute(call, size) if operation == COMPUTE else self._warm_up(operation, call)
        except Exception as error:  # noqa: BLE001 - the server raises it
            self._socket.sendall(FAILED)
            send(self._socket, error_record(error))
        else:
            self._socket.sendall(DONE + answer)

    def _warm_up(self, operation: int, call: bytes) -> bytes:
        if operation != ASK:
            layout = self._calls.layout_of(call)
            self._session.prepare(layout.dims, [place.name for place in layout.outputs], compute=operation == WARM_UP)
        return b""

    def _compute(self, call: bytes, size: int) -> bytes:
        """Compute with memory of `size` bytes, and return what follows `DONE`."""
        layout = self._calls.layout_of(call)
        memory = self._memory_of(size)
        answer = self._session.infer(views(layout.inputs, memory), layout.dims, [place.name for place in layout.outputs])
        places, end, numbers = self._calls.answered(layout, answer)
        if end > size:  # outputs whose size the server did not know
            os.ftruncate(self._file, end)
            memory = self._memory_of(end)
        write_arrays(answer, places, memory)
        return numbers

    def _memory_of(self, size: int) -> NDArray[np.uint8]:
        """Return the memory of a call, which has `size` bytes. Larger memory is not kept: the server frees it."""
        memory, self._memory = self._memory, None
        if memory is None or memory.nbytes != size:
            memory = mapped(self._file, size)
        if size <= KEPT_BYTES:
            self._memory = memory
        return memory
