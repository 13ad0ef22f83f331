"""A new version on trial, in a process of its own, before it may come near the one that serves.

An engine is native code that runs whatever graph it is given: it may crash, hang, or take all memory, and no `try` holds that back. So a
fresh process goes first. It takes what the server leaves of the cores, has a time and a memory limit, and is the one that the system kills
if memory runs out. There the whole of `muntin.runtime.verify` is done, and the model is opened and warmed up as it will be to serve.
That is not thrown away: what the engine compiles lands in the user's cache, so that the process that is to serve (`engine_process`) opens
it quickly.

Question and answer are JSON over pipes. What the process prints otherwise is kept aside and named if it dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

import numpy as np

from muntin.artifact import Signature
from muntin.artifact.store import read_manifest
from muntin.errors import MuntinError, RecipeError, VerificationError
from muntin.runtime.hardware import memory_gib
from muntin.runtime.memory import kills_for_memory, resident, resident_of
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import Session
from muntin.runtime.verification import verify
from muntin.serving.engine_host import call_of, end_after, error_of, said_of
from muntin.serving.engine_process import can_open_apart, open_apart
from muntin.serving.scheduling import PATIENCE, Demand, Pace, nobody, take_short_turns
from muntin.serving.version import TOO_LONG, Call, NotReadyError, Opened, TookTooLongError, open_version, starting_calls

ROUNDS = 5
"""Calls of each kind that are timed."""
REST = 3.0
"""How many times as long as a step of opening took nothing is done after it where requests come: compiling and warming up at one go would
keep them waiting for as long as all of it takes."""
OFTEN = 4
"""Batches of a kind after which the next version is warmed up for it though it need not be."""
_POLL_S = 0.02
_START = """
import os, sys
if {idle!r}:  # before anything is imported: that alone takes most of a second of a core
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        pass
sys.path[:] = {path!r}
from muntin.serving.probation import answer
answer()
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the process of a trial may take.

    `seconds`: until it is ended, above 0. `idle_seconds`: for so long, but no more than half of `seconds`, it computes only while a core
    has nothing else to do (Linux), which nobody notices. On a server that is never idle it does not come to an end that way: then it is
    begun anew with `niceness`, 0 to 19, that is with a small share of the cores. `memory_gib`: resident memory at which it is ended, above
    0; None: half of what this process may use, since during a swap two versions are in memory. Watched on Linux.
    """

    seconds: float = 300.0
    idle_seconds: float = 60.0
    memory_gib: float | None = None
    niceness: int = 10

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise RecipeError(f"seconds={self.seconds!r}: give the seconds that a trial may take, above 0")
        if not self.idle_seconds >= 0:
            raise RecipeError(f"idle_seconds={self.idle_seconds!r}: give seconds from 0")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise RecipeError(f"memory_gib={self.memory_gib!r}: give GiB above 0, or None for half of the memory")
        if self.niceness not in range(20):
            raise RecipeError(f"niceness={self.niceness!r}: give a whole number from 0 to 19")

    @property
    def memory_bytes(self) -> float | None:
        if self.memory_gib is not None:
            return self.memory_gib * 2**30
        whole = memory_gib()
        return None if whole is None else whole * 2**30 / 2


@dataclass(frozen=True, kw_only=True)
class Probation:
    """What was found of a version that passed.

    `digest` and `signature` are of what was tried. `open_s`: opening and warming up, with what verification had compiled. `latency_ms`:
    the median of a few calls of each kind, taken at low priority. `peak_mib`: resident memory of the process at its peak, None where the
    system does not say.
    """

    digest: str
    signature: Signature
    open_s: float
    latency_ms: dict[Call, float]
    peak_mib: float | None


Examine = Callable[[Path, SessionOptions, tuple[Call, ...]], Probation]
"""What a trial consists of: a function of a module that can be imported."""


def examine(path: Path, opening: SessionOptions, lately: tuple[Call, ...]) -> Probation:
    """Verifies an artefact, opens it as the server will, and times it. Raises what these raise, VerificationError for a failed check."""
    result = verify(path, opening)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{path}: {result.problems[0]}{more}")
    started = time.perf_counter()
    opened = open_version(path, opening, lately)
    open_s = time.perf_counter() - started
    if opened.digest != result.digests["manifest.json"]:
        raise _replaced(path)
    _, peak = resident()
    return Probation(
        digest=opened.digest,
        signature=opened.signature,
        open_s=open_s,
        latency_ms={call: _milliseconds(opened.session, call) for call in opened.calls},
        peak_mib=None if peak is None else peak / 2**20,
    )


def _milliseconds(session: Session, call: Call) -> float:
    images_BHWC = np.zeros((*call.shape, session.signature.channels), np.uint8)
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        (session.labels if call.labels else session)(images_BHWC)
        times.append((time.perf_counter() - started) * 1e3)
    return median(times)


def _replaced(path: Path) -> VerificationError:
    return VerificationError(f"{path}: it was replaced while it was being opened: load it again")


def _never() -> bool:
    return False


def endless(channels: int) -> float:
    """No budget."""
    return inf


def _somebody() -> Demand:
    return Demand.SERVED


def probe(
    path: Path,
    opening: SessionOptions,
    lately: Iterable[Call],
    *,
    limits: Limits,
    stopped: Callable[[], bool] = _never,
    demand: Callable[[], Demand] = nobody,
    examine: Examine = examine,
) -> Probation:
    """Tries an artefact in a new process of this Python, which takes about a second longer than verifying and opening it there.

    `lately`: calls to warm up. `stopped`: asked many times a second; once it is true the trial ends. What takes only
    idle time runs a quarter of it or less, by the `demand` (`Pace`), and its limits are up to four times as long. Raises what `examine`
    raises, VerificationError naming what happened where the process dies, hangs or takes too much memory, NotReadyError where stopped.
    """
    question = {
        "examine": [examine.__module__, examine.__qualname__],
        "path": str(path),
        "opening": asdict(opening),
        "lately": list(lately),
        "limits": asdict(limits),
    }
    idle = min(limits.idle_seconds, limits.seconds / 2) if hasattr(os, "SCHED_IDLE") else 0.0
    if idle:
        with suppress(_StarvedError):
            return _try(path, question | {"idle": True}, limits, idle, stopped, demand)
    return _try(path, question | {"idle": False}, limits, limits.seconds - idle, stopped, nobody)


class _StarvedError(Exception):
    """A trial that takes only idle time did not come to an end."""


def _try(
    path: Path,
    question: dict[str, Any],
    limits: Limits,
    seconds: float,
    stopped: Callable[[], bool],
    demand: Callable[[], Demand],
) -> Probation:
    with (
        TemporaryFile() as printed,  # not a pipe: who prints without end must not fill the server's memory
        subprocess.Popen(  # noqa: S603 - this Python, and a text of ours
            [sys.executable, "-c", _START.format(path=sys.path, idle=question["idle"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            # Ctrl-C at the terminal is for the server, which ends its trials itself. A group and no session of its own: where Linux groups
            # threads by session (sched_autogroup) niceness counts only inside one, and a trial would take half of the server's core.
            process_group=0,
        ) as process,
    ):
        kills = kills_for_memory()
        try:
            with Pace(process, demand) as pace:
                answer = _await_answer(process, question, path, limits, seconds, stopped, pace)
        finally:
            process.kill()
        if process.returncode:
            raise VerificationError(f"{path}: {_how_it_ended(process.returncode, printed, kills)}")
        return _read(answer, path)


def _await_answer(
    process: subprocess.Popen[bytes],
    question: dict[str, Any],
    path: Path,
    limits: Limits,
    seconds: float,
    stopped: Callable[[], bool],
    pace: Pace,
) -> bytes:
    deadline, most = time.monotonic() + seconds, limits.memory_bytes
    given: bytes | None = json.dumps(question).encode()
    while True:
        try:
            answer: bytes = process.communicate(given, timeout=_POLL_S)[0]
            return answer
        except subprocess.TimeoutExpired:
            given = None  # it was sent, or is being sent, and must not be given again
        if stopped():
            raise NotReadyError(f"{path}: its trial was ended with the server")
        if time.monotonic() > deadline + pace.excused and question["idle"]:
            raise _StarvedError
        if time.monotonic() > deadline + pace.excused:
            raise TookTooLongError(f"{path}: it was not open, verified and warm after {limits.seconds:g} s: {TOO_LONG}")
        taken = resident_of(process.pid)
        if most is not None and taken is not None and taken > most:
            raise VerificationError(
                f"{path}: opening it took {taken / 2**30:.2f} GiB of memory (allowed: {most / 2**30:.2f}): "
                "lower --max-batch, or export it for smaller images"
            )


def _how_it_ended(returncode: int, printed: IO[bytes], kills: int | None) -> str:
    """`kills`: how many processes the system had ended for want of memory before."""
    if returncode < 0:
        if returncode == -signal.SIGKILL and kills is not None and kills != kills_for_memory():
            return "the system ended the process that tried it, for want of memory: free some, or lower --max-batch"
        what = signal.strsignal(-returncode)
        return f"its engine ended the process that tried it, by signal {-returncode}" + (f" ({what})" if what else "")
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - 4096))
    lines = printed.read().decode(errors="replace").strip().splitlines() or [f"exit code {returncode}"]
    return f"the process that tried it failed: {lines[-1][:300]}"


def _read(answer: bytes, path: Path) -> Probation:
    try:
        found = json.loads(answer)
    except ValueError as error:
        raise VerificationError(f"{path}: the process that tried it ended without an answer") from error
    if "error" in found:
        raised = error_of(found)
        raise VerificationError(f"{path}: there is no memory to open it") if isinstance(raised, MemoryError) else raised
    latency_ms = {call_of(call): milliseconds for call, milliseconds in found.pop("latency_ms")}
    return Probation(signature=Signature.model_validate(found.pop("signature")), latency_ms=latency_ms, **found)


# ---- from a path to a version that is open here ----


class Loader(Protocol):
    """Opens versions for a slot: `probe` where it can do no harm, `open` where it serves. `lately`: what the predecessor was asked, and how
    often. `stopped`: asked now and then; once it is true both end with a NotReadyError."""

    def probe(self, path: Path, lately: Mapping[Call, int], stopped: Callable[[], bool]) -> Probation: ...

    def open(self, path: Path, lately: Mapping[Call, int], found: Probation, stopped: Callable[[], bool]) -> Opened: ...


@dataclass(frozen=True, kw_only=True)
class ArtifactLoader:
    """Artefacts, tried in a process of their own first.

    Each is warmed up for batches of up to `max_batch` images of the size that it was exported with, and for all
    that its predecessor was asked lately; with `dynamic`, where other sizes need no compiling, for what it was asked `OFTEN`. `budget`:
    as of a `Compiler`, for what was asked lately and is not of its start; what was asked most goes first. `demand`: who is served
    now, whom all this is not to keep waiting.
    """

    opening: SessionOptions = DEFAULT_OPTIONS
    max_batch: int = 0
    limits: Limits = field(default_factory=Limits)
    budget: Callable[[int], float] = endless
    demand: Callable[[], Demand] = _somebody

    def probe(self, path: Path, lately: Mapping[Call, int], stopped: Callable[[], bool]) -> Probation:
        limits = self.limits if lately else replace(self.limits, idle_seconds=0.0)  # where nobody is served nobody is to be spared
        calls = self._calls(path, self._start(path), lately)
        return probe(path, self.opening, calls, limits=limits, stopped=stopped, demand=self.demand)

    def open(self, path: Path, lately: Mapping[Call, int], found: Probation, stopped: Callable[[], bool] = _never) -> Opened:
        start = self._start(path)
        rest, calls = REST if lately else 0.0, self._calls(path, start, lately)
        if can_open_apart():
            opened = open_apart(path, self.opening, calls, rest=rest, seconds=self.limits.seconds, stopped=stopped, demand=self.demand)
        else:
            opened = open_version(path, self.opening, calls, rest=rest, stopped=stopped)
        if opened.digest != found.digest:
            opened.session.close()
            raise _replaced(path)
        return replace(opened, start=start)

    def _start(self, path: Path) -> tuple[Call, ...]:
        """The calls that every version is compiled for. Only the manifest is read in this process."""
        return starting_calls(read_manifest(path), self.max_batch) if self.max_batch else ()

    def _calls(self, path: Path, start: tuple[Call, ...], lately: Mapping[Call, int]) -> tuple[Call, ...]:
        asked = {call: count for call, count in lately.items() if count >= OFTEN or not self.opening.dynamic}
        kept = set(start)
        if not asked.keys() - kept:
            return start
        left = self.budget(read_manifest(path).signature.channels)
        for call in sorted(asked.keys() - kept, key=lambda call: (-asked[call], call.pixels)):
            if call.pixels <= left:
                left -= call.pixels
                kept.add(call)
        return (*start, *(call for call in asked if call in kept and call not in start))


# ---- in the new process ----


def answer() -> None:
    """Reads from standard input what to try, tries it, writes a `Probation` or an error, as JSON, to standard output."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # standard output is for the answer alone: what libraries print there goes to standard error from now on
        question = json.load(sys.stdin)
        _confine(Limits(**question["limits"]), PATIENCE if question["idle"] else 1)
        module, name = question["examine"]
        opening = SessionOptions(**question["opening"])
        try:
            examined: Examine = getattr(import_module(module), name)
            found = examined(Path(question["path"]), opening, tuple(call_of(call) for call in question["lately"]))
            said = asdict(found) | {"signature": found.signature.model_dump(mode="json"), "latency_ms": list(found.latency_ms.items())}
        except (MuntinError, MemoryError) as error:  # what else comes is told by its last line, as what ends the process is
            said = said_of(error)
        json.dump(said, answers)


def _confine(limits: Limits, patience: float) -> None:
    """Stands back for the server, is the first to go where memory runs out, and goes by itself if the server is gone."""
    if hasattr(os, "nice") and not (hasattr(os, "SCHED_IDLE") and os.sched_getscheduler(0) == os.SCHED_IDLE):
        os.nice(limits.niceness)
        take_short_turns()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    end_after(patience * limits.seconds + 5)
    with suppress(ImportError, OSError, ValueError):
        resource = import_module("resource")  # POSIX's: no file as large as the process is written where it crashes
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
