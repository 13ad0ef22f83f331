"""Start the process of an engine (`child`), wait until it has opened its artefact, and end it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

from muntin.errors import VerificationError
from muntin.runtime.host.hardware import memory_gib
from muntin.runtime.host.helper_process import recorded_error, start_socket_helper
from muntin.runtime.host.memory import kills_for_memory, resident_of
from muntin.runtime.options import SessionOptions
from muntin.serving.worker import child
from muntin.serving.worker.calls import Call
from muntin.serving.worker.channel import EngineChannel, receive, send
from muntin.serving.worker.opening import NotReadyError, TookTooLongError
from muntin.serving.worker.turns import RUN_S, Turns, can_take_turns

MEMORY_SHARE = 0.5
"""Share of the memory that this process may use at which an opening is ended: two versions are in memory during a swap. Linux only."""
_POLL_S = 0.05
"""Polling interval while the artefact is being opened, seconds."""
_CLOSED_S, _KILLED_S = 2.0, 5.0
"""Seconds in which a process ends after it has closed its connection, and after it was killed: the kernel frees its memory."""


_KILLED = -9
"""Return code of a process that was killed. Windows has no such code."""


def memory_bound() -> float | None:
    """Return the most bytes of resident memory for opening an artefact for the first time; None where the system does not say."""
    total_gib = memory_gib()
    return None if total_gib is None else MEMORY_SHARE * total_gib * 2**30


class OpeningWatch:
    """Limits of a process that opens an artefact: to be called with its number now and then. Raises the error of a limit.

    `memory_bytes`: maximum of resident memory; Linux only.
    """

    def __init__(self, path: Path, seconds: float, stopped: Callable[[], bool], *, memory_bytes: float | None = None) -> None:
        self._path, self._seconds, self._stopped, self._memory_bytes = path, seconds, stopped, memory_bytes
        self._deadline = time.monotonic() + seconds

    def __call__(self, process: int) -> None:
        if self._stopped():
            raise NotReadyError(f"{self._path}: opening it was ended with the server")
        if time.monotonic() > self._deadline:
            raise TookTooLongError(
                f"{self._path}: it was not open and warm after {self._seconds:g} s: it hangs, or this machine is too slow for all that it "
                "is compiled for: lower --max-batch"
            )
        taken = None if self._memory_bytes is None else resident_of(process)
        if self._memory_bytes is not None and taken is not None and taken > self._memory_bytes:
            raise VerificationError(
                f"{self._path}: opening it took {taken / 2**30:.2f} GiB of memory (allowed: {self._memory_bytes / 2**30:.2f}): "
                "lower --max-batch, or export it for smaller images"
            )


def describe_end(returncode: int, kills: int | None) -> tuple[str, bool]:
    """Describe how a process ended, and return whether the kernel ended it because memory ran out.

    `kills`: number of such kills when it started; None: unknown. Only the kernel's log, which few may read, says which process was ended.
    It was this one, as far as can be told, if it was killed and the number of such kills has grown.
    """
    if returncode >= 0:
        return f"exit code {returncode}", False
    name = signal.strsignal(-returncode)
    text = f"signal {-returncode}" + (f", {name}" if name else "")
    kills_now = kills_for_memory()
    if returncode != _KILLED or kills is None or kills_now is None or kills_now <= kills:
        return text, False
    return f"{text}: out of memory", True


def checked_answer(path: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the answer of a process that has opened an artefact, or raise the error in it."""
    if "error" not in record:
        return record
    error = recorded_error(record)
    if isinstance(error, MemoryError):
        raise VerificationError(f"{path}: there is no memory to open it") from error
    raise error


@dataclass(kw_only=True)
class RunningEngine:
    """The process of an engine that has opened its artefact.

    `description`: its message about the session. `idle`, `busy`: its channels; each operation on these is atomic. `interrupted`: whether
    this process has ended it.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    description: Mapping[str, Any] = field(default_factory=dict)
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
        """Kill the process and close its channels."""
        self.interrupt()
        self.control.close()
        with suppress(IndexError):
            while True:
                self.idle.pop().close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILLED_S)

    def cause_of_end(self) -> tuple[str, bool]:
        """Return what `describe_end` does. The same for all calls of the process, whatever is killed between them."""
        with self._cause_lock:
            if self._cause is None:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_CLOSED_S)
                if self.process.returncode is None:
                    return "it does not answer", False
                self._cause = describe_end(self.process.returncode, None if self.interrupted else self._kills)
            return self._cause


def start_engine(
    path: Path,
    options: SessionOptions,
    calls: Iterable[Call],
    *,
    seconds: float,
    busy: Callable[[], bool] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    digest: str = "",
    verify: bool = False,
    hurry: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> RunningEngine:
    """Start a process and open an artefact in it, as `open_version` does. `busy`: whether requests are computed now; meanwhile the process
    is stopped for a share of the time (`turns.Turns`).

    Raises the errors of `open_version`, VerificationError if the process dies, or takes more than `MEMORY_SHARE` to `verify`,
    TookTooLongError after `seconds`, and NotReadyError if `stopped`.
    """
    watch = OpeningWatch(path, seconds, stopped, memory_bytes=memory_bound() if verify else None)
    process, control = start_socket_helper(child.main)
    running = RunningEngine(process=process, control=control)
    turns = Turns(process.pid, busy) if busy is not None and can_take_turns() else None
    try:
        watch(process.pid)
        question = {
            "path": str(path), "options": asdict(options), "calls": list(calls), "digest": digest, "verify": verify,
            "hurry": hurry,
        }  # fmt: skip
        with suppress(OSError):  # it has died: its end is reported below
            send(control, question | {"seconds": seconds + 5})  # this process ends it before that, if it still runs
        while "engine" not in running.description:
            while not wait([control], _POLL_S if turns is None else RUN_S):
                watch(process.pid)
                if turns is not None:
                    turns.pause()
            received = receive(control)
            if received is None:
                end, out_of_memory = running.cause_of_end()
                advice = ": free some, or lower --max-batch" if out_of_memory else ""
                raise VerificationError(f"{path}: its engine ended the process that opened it: {end}{advice}")
            running.description = checked_answer(path, received[0])
            if "progress" in running.description:
                progress(running.description["progress"])
    except BaseException:
        running.end()
        raise
    return running
