"""Beginning an engine's process, in which an artefact is opened (`engine_host`), and ending it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from muntin.errors import VerificationError
from muntin.runtime.memory import kills_for_memory
from muntin.runtime.options import SessionOptions
from muntin.serving.engine_host import error_of, receive, send
from muntin.serving.engine_lane import Lane
from muntin.serving.scheduling import PATIENCE, Demand, Pace, Standing, nobody, stand_back
from muntin.serving.version import TOO_LONG, Call, NotReadyError, TookTooLongError

_POLL_S = 0.05
_ENDS_S, _END_S = 2.0, 5.0
"""What a process has to end in whose connection has ended, and one that was killed: the kernel frees its memory."""
_LOOK_S = 10.0
"""Between two looks at how many processes the kernel has ended for want of memory."""
_START = """
import os, sys
if {idle!r}:  # before anything is imported
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
sys.path[:] = {path!r}
from muntin.serving.engine_host import main
main()
"""


@dataclass(kw_only=True)
class Running:
    """A process that has opened its artefact: what it said of it, its lanes that nobody uses now, and the others."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    said: dict[str, Any] = field(default_factory=dict)
    # Each operation on these is atomic: a lock of ours would be one more thing that a call has to do.
    lanes: list[Lane] = field(default_factory=list)
    busy: set[Lane] = field(default_factory=set)
    _interrupted: bool = False
    _how: tuple[str, bool] | None = None
    _deciding: Lock = field(default_factory=Lock)
    _kills: int | None = field(default_factory=lambda: kills_for_memory())
    _looked: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Now and then, while nothing is asked of it: processes that the kernel has ended for want of memory until then were others."""
        if not self.busy and (now := time.monotonic()) - self._looked > _LOOK_S:
            self._looked, self._kills = now, kills_for_memory()

    def interrupt(self) -> None:
        """Ends whatever it is at; `end` has to follow."""
        self._interrupted = True
        self.process.kill()

    def end(self, *, gently: bool = False) -> None:
        """`gently`: the kernel frees its memory where that keeps nobody waiting."""
        if gently:
            stand_back(self.process.pid)
        self.interrupt()
        self.control.close()
        with suppress(IndexError):
            while True:
                self.lanes.pop().close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)

    def how_it_ended(self) -> tuple[str, bool]:
        """Of one that ends, or has ended, in words; and whether the kernel has ended it for want of memory. The same for all of its
        calls."""
        with self._deciding:
            if self._how is None:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_ENDS_S)
                if self.process.returncode is None:
                    return "it does not answer", False
                lacked = self._ended_by_kernel()
                self._how = _told(self.process.returncode) + (": out of memory" if lacked else ""), lacked
            return self._how

    def _ended_by_kernel(self) -> bool:
        """Who was ended for want of memory is in the kernel's log alone, which few may read: it was killed while their number grew."""
        if self._interrupted or not hasattr(signal, "SIGKILL") or self.process.returncode != -signal.SIGKILL:
            return False
        kills = kills_for_memory()
        return kills is not None and self._kills is not None and kills > self._kills


def _told(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    what = signal.strsignal(-code)
    return f"signal {-code}" + (f", {what}" if what else "")


def _never() -> bool:
    return False


@contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def begin_in_process(
    path: Path,
    opening: SessionOptions,
    lately: Iterable[Call],
    *,
    seconds: float,
    rest: float = 0.0,
    stopped: Callable[[], bool] = _never,
    demand: Callable[[], Demand] = nobody,
    digest: str = "",
) -> Running:
    """`digest`: what the artefact has to have still."""
    standing = Standing() if rest and Standing.allowed() else None
    control, theirs = socket.socketpair()
    with theirs, _closed_on_error(control):
        process = subprocess.Popen(  # noqa: S603 - this Python, and a text of ours
            [sys.executable, "-c", _START.format(path=sys.path, idle=standing is not None)],
            stdin=theirs.fileno(),
            stdout=2,  # standard output may be the access log; engines print what they like
            process_group=0,  # as a trial's (`probation`)
        )
    running = Running(process=process, control=control)
    try:
        question = {"path": str(path), "opening": asdict(opening), "lately": list(lately), "rest": rest if standing is None else 0.0}
        question["seconds"] = PATIENCE * seconds + 5  # the server ends it before, if it is there
        with Pace(process, demand if standing is not None else nobody) as pace:
            running.said = _ask_to_open(running, question, standing, pace, seconds, stopped)
        if digest and running.said["digest"] != digest:
            raise VerificationError(f"{path}: it was replaced while it served: load it again")
        if standing is not None:
            standing.usual(process.pid)
    except BaseException:
        running.end()
        raise
    return running


def _ask_to_open(
    running: Running, question: dict[str, Any], standing: Standing | None, pace: Pace, seconds: float, stopped: Callable[[], bool]
) -> dict[str, Any]:
    path = question["path"]
    with suppress(OSError):  # what it died of is told below
        send(running.control, question)
    began = time.monotonic()
    running.control.settimeout(_POLL_S)
    while True:
        try:
            first = running.control.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            first = None
        except ConnectionError:
            first = b""
        now = time.monotonic()
        if first is not None:
            break
        if stopped():
            raise NotReadyError(f"{path}: opening it was ended with the server")
        if now - began > seconds + pace.excused:
            raise TookTooLongError(f"{path}: it was not open and warm after {seconds:g} s: {TOO_LONG}")
        if standing is not None:
            standing.mind(running.process.pid, pace.excused)
    running.control.settimeout(None)
    came = receive(running.control)
    if came is None:
        raise VerificationError(f"{path}: its engine ended the process that opened it: {running.how_it_ended()[0]}")
    said = came[0]
    if "error" in said:
        error = error_of(said)
        if isinstance(error, MemoryError):
            raise VerificationError(f"{path}: there is no memory to open it") from error
        raise error
    return said
