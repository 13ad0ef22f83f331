"""The process of an engine as a session sees it: its channels, its death, and its restart.

An engine is native code. If it crashes, only its process ends: the call fails, and the next one starts another process. If it hangs, its
process can be ended, which a thread cannot. While a version is opened or closed, compiling and freeing do not hold the interpreter's and
the allocator's locks that requests need, and all of its memory goes with the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from muntin.serving.worker.calls import Call, call_from_json
from muntin.serving.worker.channel import EngineChannel
from muntin.serving.worker.launch import RunningEngine
from muntin.serving.worker.liveness import Liveness
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, OutOfMemoryError

DEATHS = 3
"""Deaths without an answer between them after which the engine is not started again at once."""
PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Seconds until it is started again then; twice as long after each further death, up to the longest."""
_RESTART_S = 5.0
"""Seconds that a call waits for a restart: less than a call may take before it counts as one that hangs."""


class EngineProcess(Liveness):
    """The process of an engine. Threads may share it; each call has a channel.

    A call during which the engine dies raises EngineDiedError. The next call starts another process, which takes as long as opening, and
    waits for it for `_RESTART_S`. After `DEATHS` deaths without an answer between them, calls raise NotReadyError until a pause is over.

    `start`: starts a process for given calls (`start_engine`). `calls`: the calls that each process is compiled for.
    """

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        Liveness.__init__(self)  # not those of the session that it is mixed with
        self._start, self._path, self._digest = start, path, running.description["digest"]
        self.calls: list[Call] = [call_from_json(call) for call in running.description["calls"]]
        self._lock = Lock()  # guards the following
        self._running: RunningEngine | None = running
        """The process that computes; None while it is restarted and after `close`."""
        self._closed = False
        self._restart_done: Event | None = None
        self._deaths_in_a_row = 0
        self._restart_at = 0.0

    @property
    def able(self) -> bool:
        return not self._closed and time.monotonic() >= self._restart_at

    @property
    def process_ids(self) -> tuple[int, ...]:
        running = self._running
        return () if running is None else (running.process.pid,)

    def check_channel(self) -> None:
        """Open a channel, and have the process answer on it: a sandbox may not allow that."""
        self._on_channel(EngineChannel.check)

    def _compiled_for(self, call: Call) -> None:
        """Have later processes compiled for a call, too."""
        if call not in self.calls:
            self.calls.append(call)

    def interrupt(self, seconds: float) -> bool:
        with self._lock:
            running = self._running
            asked_at = inf if running is None else min((channel.asked_at for channel in running.busy.copy()), default=inf)
        if running is None or time.monotonic() - asked_at < seconds:
            return False  # the call waits for a restart
        running.interrupt()
        return True

    def revive(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        time.sleep(max(0.0, min(deadline, self._restart_at) - time.monotonic()))
        try:
            self._restarted(deadline - time.monotonic())
        except NotReadyError:
            return False
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running, self._running = self._running, None
        if running is not None:
            running.end()

    # ---- calls ----

    def _on_channel(self, work: Callable[[EngineChannel], Any]) -> Any:
        running = self._running
        if running is not None and running.process.poll() is not None:  # it died between two calls
            self._died(running)
            running = None
        if running is None:
            running = self._restarted(_RESTART_S)
        channel = None
        try:
            try:
                channel = running.idle.pop()
            except IndexError:
                channel = EngineChannel(running.control)
            running.busy.add(channel)
            result = work(channel)
        except (EOFError, OSError) as error:
            if not isinstance(error, EOFError | ConnectionError) and running.process.poll() is None:
                raise  # this process may open no more files, or has no memory
            raise self._died(running) from error
        finally:
            if channel is not None:
                running.busy.discard(channel)
                if channel.asked_at == inf:
                    running.idle.append(channel)
        self._deaths_in_a_row = 0
        return result

    # ---- deaths and restarts ----

    def _died(self, running: RunningEngine) -> EngineDiedError:
        """Count the death of a process, once, and return the error for a call during which it died."""
        cause, out_of_memory = running.cause_of_end()
        text = f"the process of its engine has ended ({cause})"
        with self._lock:
            if self._running is running:
                self._running = None
                self._count_death(text)
        running.end()
        return (OutOfMemoryError if out_of_memory else EngineDiedError)(f"{self._path}: {text}")

    def _count_death(self, cause: str) -> None:
        """Requires the lock."""
        self.deaths += 1
        self.last_death = cause
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= DEATHS:
            pause = PAUSE_S * 2 ** min(self._deaths_in_a_row - DEATHS, 10)
            self._restart_at = time.monotonic() + min(LONGEST_PAUSE_S, pause)

    def _restarted(self, seconds: float) -> RunningEngine:
        """Return the process, started again by a thread if it has died. All calls wait for the same restart, each for `seconds`.

        Raises NotReadyError if it does not run then.
        """
        with self._lock:
            if self._running is not None:
                return self._running
            done = self._restart_done or self._begin_restart()
        if not done.wait(seconds):
            raise NotReadyError(f"{self._path}: its engine died, and is being begun again")
        running = self._running
        if running is None:
            raise NotReadyError(f"{self._path}: {'it is closed' if self._closed else self.last_death}")
        return running

    def _begin_restart(self) -> Event:
        """Requires the lock."""
        if self._closed:
            raise NotReadyError(f"{self._path}: it is closed")
        if (pause := self._restart_at - time.monotonic()) > 0:
            raise NotReadyError(f"{self._path}: its engine died {self._deaths_in_a_row} times in a row: it is begun again in {pause:.0f} s")
        done = Event()
        Thread(target=self._restart, args=(done,), name="muntin-engine-restart", daemon=True).start()  # it waits for the lock at its end
        self._restart_done = done
        return done

    def _restart(self, done: Event) -> None:
        running, failure = None, ""
        try:
            running = self._start(self.calls, digest=self._digest, hurry=True, stopped=lambda: self._closed)
        except BaseException as error:  # noqa: BLE001 - the calls that wait raise it
            failure = f"its engine cannot be begun again: {error}"
        with self._lock:
            if running is None:
                self._count_death(failure)
            elif not self._closed:
                self._running, running = running, None
            self._restart_done = None
        done.set()
        if running is not None:  # the session was closed meanwhile
            running.end()
