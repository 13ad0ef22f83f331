"""Start the process of an engine (`child`), wait until it has opened its artefact, and end it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from muntin.errors import VerificationError
from muntin.runtime.host.helper_process import recorded_error, start_socket_helper
from muntin.runtime.host.memory import kills_for_memory
from muntin.runtime.options import SessionOptions
from muntin.serving.worker import child
from muntin.serving.worker.background_priority import BackgroundPriority, can_restore, run_when_idle
from muntin.serving.worker.channel import EngineChannel, receive, send
from muntin.serving.worker.opening import TOO_LONG, Call, NotReadyError, TookTooLongError

_POLL_S = 0.05
"""Polling interval while the artefact is being opened, seconds."""
_CLOSED_S, _KILLED_S = 2.0, 5.0
"""Seconds in which a process ends after it has closed its connection, and after it was killed: the kernel frees its memory."""


@dataclass(kw_only=True)
class RunningEngine:
    """The process of an engine that has opened its artefact.

    `description`: its message about the session. `idle`, `busy`: its channels; each operation on these is atomic. `interrupted`: whether
    this process has ended it.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    description: dict[str, Any] = field(default_factory=dict)
    idle: list[EngineChannel] = field(default_factory=list)
    busy: set[EngineChannel] = field(default_factory=set)
    interrupted: bool = False
    _kills: int | None = field(default_factory=lambda: kills_for_memory())
    _cause: tuple[str, bool] | None = None
    _cause_lock: Lock = field(default_factory=Lock)

    def interrupt(self) -> None:
        """Kill the process. `end` has to follow."""
        self.interrupted = True
        self.process.kill()

    def end(self) -> None:
        """Kill the process and close its channels. The kernel frees its memory while a core is idle."""
        run_when_idle(self.process.pid)
        self.interrupt()
        self.control.close()
        with suppress(IndexError):
            while True:
                self.idle.pop().close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILLED_S)

    def cause_of_end(self) -> tuple[str, bool]:
        """Return how the process ended, in words, and whether the kernel ended it because memory ran out. The same for all of its calls."""
        with self._cause_lock:
            if self._cause is None:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_CLOSED_S)
                if self.process.returncode is None:
                    return "it does not answer", False
                out_of_memory = self._was_ended_by_kernel()
                self._cause = _ending(self.process.returncode) + (": out of memory" if out_of_memory else ""), out_of_memory
            return self._cause

    def _was_ended_by_kernel(self) -> bool:
        """Only the kernel's log, which few may read, says which process was ended. It was this one, as far as can be told, if it was killed
        by another process than this and the number of such kills has grown since it started."""
        if self.interrupted or not hasattr(signal, "SIGKILL") or self.process.returncode != -signal.SIGKILL:
            return False
        kills = kills_for_memory()
        return kills is not None and self._kills is not None and kills > self._kills


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    name = signal.strsignal(-returncode)
    return f"signal {-returncode}" + (f", {name}" if name else "")


def start_engine(
    path: Path,
    options: SessionOptions,
    lately: Iterable[Call],
    *,
    seconds: float,
    rest: float = 0.0,
    stopped: Callable[[], bool] = lambda: False,
    digest: str = "",
) -> RunningEngine:
    """Start a process and open an artefact in it, as `open_version` does. `digest`: what the artefact must have, if given.

    With `rest`, above 0 while requests are answered, the process has a low priority until the artefact is open (`BackgroundPriority`);
    where that cannot be restored, it rests between its steps. Raises the errors of `open_version`, VerificationError if the process dies,
    TookTooLongError after `seconds`, and NotReadyError if `stopped`.
    """
    in_background = rest > 0 and can_restore()
    process, control = start_socket_helper(child.main)
    running = RunningEngine(process=process, control=control)
    try:
        priority = BackgroundPriority(process.pid) if in_background else None
        with suppress(OSError):  # it has died: `_await_answer` says of what
            send(control, {
                "path": str(path), "options": asdict(options), "lately": list(lately), "rest": 0.0 if in_background else rest,
                "seconds": seconds + 5,  # this process ends it before that, if it still runs
            })  # fmt: skip
        _await_answer(running, path, priority, seconds, stopped)
        received = receive(control)
        if received is None:
            raise VerificationError(f"{path}: its engine ended the process that opened it: {running.cause_of_end()[0]}")
        running.description = _description(path, received[0])
        if digest and running.description["digest"] != digest:
            raise VerificationError(f"{path}: it was replaced while it served: load it again")
        if priority is not None:
            priority.restore()
    except BaseException:
        running.end()
        raise
    return running


def _await_answer(
    running: RunningEngine, path: Path, priority: BackgroundPriority | None, seconds: float, stopped: Callable[[], bool]
) -> None:
    """Wait until the process answers or ends."""
    deadline = time.monotonic() + seconds
    running.control.settimeout(_POLL_S)
    while True:
        with suppress(TimeoutError):
            with suppress(ConnectionError):
                running.control.recv(1, socket.MSG_PEEK)
            break
        if stopped():
            raise NotReadyError(f"{path}: opening it was ended with the server")
        if time.monotonic() > deadline:
            raise TookTooLongError(f"{path}: it was not open and warm after {seconds:g} s: {TOO_LONG}")
        if priority is not None:
            priority.update()
    running.control.settimeout(None)


def _description(path: Path, message: dict[str, Any]) -> dict[str, Any]:
    """Return the description of an opened session, or raise the error that the message holds."""
    if "error" not in message:
        return message
    error = recorded_error(message)
    if isinstance(error, MemoryError):
        raise VerificationError(f"{path}: there is no memory to open it") from error
    raise error
