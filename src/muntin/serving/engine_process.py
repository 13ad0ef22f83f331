"""An artefact that is open in a process of its own: for the server a session like another.

    call -> a lane: images into its memory -> the process computes -> the answer out of it

An engine is native code. What it does wrong stays in its process: where it crashes, the call fails and the next one begins another
process; where it does not come back, it is ended, which no thread can be. While a version is opened, and when it goes, its compiling and
freeing take nothing of the interpreter's and the allocator's locks that requests need; and what it held goes with it, to the last byte.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muntin.artifact import Signature
from muntin.errors import VerificationError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import ExecutedLayer, Session, Shape, check_shapes
from muntin.serving.engine_host import LABELS, SCORES, call_of
from muntin.serving.engine_lane import Lane
from muntin.serving.engine_start import Running, begin_in_process
from muntin.serving.scheduling import Demand
from muntin.serving.shared_memory import SharedBuffers
from muntin.serving.version import TOO_LONG, Call, EngineDiedError, NotReadyError, Opened, OutOfMemoryError, TookTooLongError

DEATHS = 3
"""Deaths of an engine without an answer between, after which it is not begun again at once."""
PAUSE_S = 2.0
"""Then it has to wait so long, twice as long after each further one, `LONGEST_PAUSE_S` at most."""
LONGEST_PAUSE_S = 60.0
_BEGIN_S = 5.0
"""What a call waits for another process at the most."""
_POLL_S = 0.05


@dataclass
class _Now:
    """The process that computes for a session; None between two of them, and at the end."""

    running: Running | None

    def end(self, *, gently: bool = False) -> None:
        running, self.running = self.running, None
        if running is not None:
            running.end(gently=gently)


def can_open_apart() -> bool:
    """Whether this system can hand an open file to another process, which memory that two have mapped takes. Windows cannot."""
    return hasattr(socket, "send_fds") and hasattr(socket, "AF_UNIX")


def open_apart(
    path: Path,
    opening: SessionOptions,
    lately: Iterable[Call],
    *,
    rest: float,
    seconds: float,
    stopped: Callable[[], bool],
    demand: Callable[[], Demand] = lambda: Demand.SERVED,
) -> Opened:
    """As `open_version`, in a new process; takes the second longer that Python and the engine take to start.

    With `rest`, above 0 where requests are answered meanwhile, it takes only what the cores have left, where it may have its share again
    afterwards (`Standing`), and a quarter of that or less by the `demand` (`Pace`); elsewhere it rests between its steps. Raises what
    opening raises, VerificationError where the process dies or is not done in `seconds`, or not with its first call in as many again,
    NotReadyError where `stopped`.
    """
    begin = partial(begin_in_process, path, opening, seconds=seconds)
    running = begin(lately, rest=rest, stopped=stopped, demand=demand)
    session = EngineProcess(running, begin, path)
    try:
        with _ended_in_time(running, path, seconds, stopped):
            session.try_out()
    except BaseException as error:
        session.close()
        if isinstance(error, NotReadyError) and not stopped():  # it died between the two, and was not there again in time
            raise VerificationError(f"{path}: {error}") from error
        raise
    return Opened(session=session, signature=session.signature, digest=running.said["digest"], calls=tuple(session.calls))


@contextmanager
def _ended_in_time(running: Running, path: Path, seconds: float, stopped: Callable[[], bool]) -> Iterator[None]:
    """Around a first call, that nobody else minds yet: its process is ended where it does not come back in time, or the server ends."""
    done, overdue = Event(), Event()
    until = time.monotonic() + seconds

    def mind() -> None:
        while not done.wait(_POLL_S):
            if stopped() or time.monotonic() > until:
                overdue.set()
                running.interrupt()
                return

    thread = Thread(target=mind, name="muntin-engine-first-call", daemon=True)
    thread.start()
    try:
        yield
    except EngineDiedError as error:
        if not overdue.is_set():
            raise
        if stopped():
            raise NotReadyError(f"{path}: opening it was ended with the server") from error
        raise TookTooLongError(f"{path}: its first call did not come back in {seconds:g} s: {TOO_LONG}") from error
    finally:
        done.set()
        thread.join()


class EngineProcess(Session):
    """A session whose engine runs in a process of its own. Threads may share it; each call has a lane.

    What dies with a call raises EngineDiedError there, and the next call begins another process: it takes as long as opening does. One that
    dies `DEATHS` times without an answer between has to wait before it is begun again, and calls fail at once meanwhile.
    """

    def __init__(self, running: Running, begin: Callable[..., Running], path: Path) -> None:
        said = running.said
        super().__init__(
            signature=Signature.model_validate(said["signature"]),
            engine=said["engine"],
            precision=said["precision"],
            threads=said["threads"],
            streams=said["streams"],
            plan=said["plan"],
        )
        self._begin, self._path, self._digest = begin, path, said["digest"]
        self.calls = [call_of(call) for call in said["calls"]]
        """What it was compiled for, by `warm_up` too: each process of it is."""
        self._lock = Lock()  # around what follows
        self._beginning = Lock()  # around beginning another one, which takes long
        self._now = _Now(running)
        finalize(self, self._now.end)  # not __del__: where a cycle goes, what this holds might go before it
        self._closed = False
        self._in_a_row = 0
        self._not_before = 0.0
        self._answers = SharedBuffers()

    @property
    def able(self) -> bool:
        return not self._closed and time.monotonic() >= self._not_before

    @property
    def dead(self) -> bool:
        return self._now.running is None and self._in_a_row >= DEATHS

    @property
    def process_ids(self) -> tuple[int, ...]:
        running = self._now.running
        return () if running is None else (running.process.pid,)

    def try_out(self) -> None:
        """Computes the smallest call that it is compiled for, here and back: a sandbox may not allow what that takes."""
        call = min(self.calls, key=lambda call: call.pixels, default=None)
        if call is not None:
            images_BHWC = np.zeros((*call.shape, self.signature.channels), np.uint8)
            (self.labels if call.labels else self)(images_BHWC)

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._compute(SCORES, images_BHWC, self.signature.scores_shape(*images_BHWC.shape[:3]), np.float32)

    def _infer_labels(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        B, _, *sides = self.signature.scores_shape(*images_BHWC.shape[:3])
        return self._compute(LABELS, images_BHWC, (B, *sides), np.uint8)

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        for shape in check_shapes(shapes):
            self._in_lane(partial(Lane.ask, op="warm_up", shape=shape, labels=labels, compute=compute))
            if (call := Call(shape, labels)) not in self.calls:
                self.calls.append(call)

    def layers(self) -> list[ExecutedLayer]:
        said = self._in_lane(partial(Lane.ask, op="layers"))
        return [ExecutedLayer(**layer) for layer in said["layers"]]

    def interrupt(self, seconds: float) -> bool:
        with self._lock:
            running = self._now.running
            since = inf if running is None else min((lane.asked_at for lane in running.busy.copy()), default=inf)
        if running is None or time.monotonic() - since < seconds:
            return False  # what takes long is to begin another one
        running.interrupt()
        return True

    def revive(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._now.running is None and not self._closed and (left := until - time.monotonic()) > 0:
            try:
                self._alive(left)
            except NotReadyError:  # somebody else begins it, or it is left alone for a while
                time.sleep(_POLL_S)
            except Exception:  # noqa: BLE001 - it cannot be begun, and the next call says why
                break
        return self._now.running is not None

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._now.end(gently=True)

    def _compute(self, operation: int, images_BHWC: NDArray[np.uint8], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        answer = self._answers.take(shape, dtype)
        self._in_lane(lambda lane: lane.compute(operation, images_BHWC, self._answers.shared(answer)))
        return answer

    def _in_lane(self, work: Callable[[Lane], Any]) -> Any:
        running = self._now.running
        if running is not None and running.process.poll() is not None:  # while nobody asked it anything
            self._died(running)
            running = None
        if running is None:
            running = self._alive()
        running.look()
        lane = None
        try:
            try:
                lane = running.lanes.pop()
            except IndexError:
                lane = Lane(running.control)
            running.busy.add(lane)
            done = work(lane)
        except (EOFError, OSError) as error:
            if not isinstance(error, EOFError | ConnectionError) and running.process.poll() is None:
                raise  # there are no files, or no memory, any more
            raise self._died(running) from error
        finally:
            if lane is not None:
                running.busy.discard(lane)
                if lane.asked_at == inf:
                    running.lanes.append(lane)
        self._in_a_row = 0
        return done

    def _alive(self, seconds: float = _BEGIN_S) -> Running:
        """Waits for another process, but no longer than a call may take before it counts as one that hangs."""
        if not self._beginning.acquire(blocking=False):
            raise NotReadyError(f"{self._path}: its engine died, and is being begun again")
        begun: Future[Running] = Future()
        try:
            Thread(target=self._begin_for, args=(begun,), name="muntin-engine-begin", daemon=True).start()
        except RuntimeError as error:  # this process may have no more threads; the next call tries again
            self._beginning.release()
            raise NotReadyError(f"{self._path}: its engine died, and cannot be begun again now: {error}") from error
        try:
            return begun.result(min(seconds, _BEGIN_S))
        except TimeoutError:
            raise NotReadyError(f"{self._path}: its engine died, and is being begun again") from None
        finally:
            del begun  # it holds what it raises, and that this frame: what callers hold would stay until garbage is collected

    def _begin_for(self, begun: Future[Running]) -> None:
        try:
            begun.set_result(self._begin_again())
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            begun.set_exception(error)
        finally:
            self._beginning.release()
            del begun  # as above

    def _begin_again(self) -> Running:
        with self._lock:
            if self._now.running is not None:
                return self._now.running
            if self._closed:
                raise NotReadyError(f"{self._path}: it is closed")
            left = self._not_before - time.monotonic()
        if left > 0:
            raise NotReadyError(f"{self._path}: its engine died {self._in_a_row} times in a row: it is begun again in {left:.0f} s")
        try:
            begun = self._begin(self.calls, digest=self._digest, stopped=lambda: self._closed)
        except BaseException as error:
            with self._lock:
                self._count_death(f"its engine cannot be begun again: {error}")
            raise
        with self._lock:
            if not self._closed:
                self._now.running = begun
                return begun
        begun.end()
        raise NotReadyError(f"{self._path}: it is closed")

    def _count_death(self, what: str) -> None:
        """Under the lock."""
        self.deaths += 1
        self.last_death = what
        self._in_a_row += 1
        if self._in_a_row >= DEATHS:
            pause = PAUSE_S * 2 ** min(self._in_a_row - DEATHS, 10)
            self._not_before = time.monotonic() + min(LONGEST_PAUSE_S, pause)

    def _died(self, running: Running) -> EngineDiedError:
        how, lacked_memory = running.how_it_ended()
        told = f"the process of its engine has ended ({how})"
        with self._lock:
            if self._now.running is running:
                self._now.running = None
                self._count_death(told)
        running.end()
        if lacked_memory:
            return OutOfMemoryError(f"{self._path}: {told}", process=running.process.pid)
        return EngineDiedError(f"{self._path}: {told}")
