"""Try a version in a process of its own, before it may come near the version that serves.

An engine is native code that runs any graph: it may crash, hang, or take all memory. The process that tries a version has a low priority,
limits of time and memory, and is the first that the kernel ends if memory runs out. It does the whole of `muntin.runtime.verify`, opens the
model and warms it up as for serving. The compiled models stay in the user's cache, so that the process that is to serve it
(`engine_process`) opens it quickly. That is another process, because raising a low priority takes privileges that few servers have.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from muntin.artifact import Signature
from muntin.errors import RecipeError, VerificationError
from muntin.runtime.host.hardware import memory_gib
from muntin.runtime.host.helper_process import Outcome, answer_question, ask_helper, recorded_error
from muntin.runtime.host.memory import kills_for_memory, resident_of
from muntin.runtime.options import SessionOptions
from muntin.runtime.verification.artifact import verify
from muntin.serving.worker.background_priority import BackgroundPriority
from muntin.serving.worker.channel import call_from_json
from muntin.serving.worker.child import end_after, set_oom_score
from muntin.serving.worker.opening import TOO_LONG, Call, NotReadyError, TookTooLongError, open_version


@dataclass(frozen=True, kw_only=True)
class OpeningLimits:
    """Limits of a process that tries or opens a version.

    `seconds`: its time, above 0. `memory_gib`: resident memory at which a trial is ended, above 0; None: half of what this process may use,
    since two versions are in memory during a swap. Linux only.
    """

    seconds: float = 300.0
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise RecipeError(f"seconds={self.seconds!r}: give the seconds that a trial may take, above 0")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise RecipeError(f"memory_gib={self.memory_gib!r}: give GiB above 0, or None for half of the memory")

    @property
    def memory_bytes(self) -> float | None:
        if self.memory_gib is not None:
            return self.memory_gib * 2**30
        total_gib = memory_gib()
        return None if total_gib is None else total_gib * 2**30 / 2


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Digest and signature of an artefact that passed its trial."""

    digest: str
    signature: Signature


Examine = Callable[[Path, SessionOptions, tuple[Call, ...]], TrialResult]
"""The steps of a trial: a function of a module that can be imported. Its last argument: calls to warm up."""


def examine(path: Path, options: SessionOptions, lately: tuple[Call, ...]) -> TrialResult:
    """Verify an artefact, and open it as for serving. Raises the errors of both, and VerificationError for a failed check."""
    result = verify(path, options)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{path}: {result.problems[0]}{more}")
    opened = open_version(path, options, lately)
    if opened.digest != result.digests["manifest.json"]:
        raise replaced(path)
    return TrialResult(digest=opened.digest, signature=opened.signature)


def replaced(path: Path) -> VerificationError:
    """Return the error for an artefact that another one replaced while it was tried or opened."""
    return VerificationError(f"{path}: it was replaced while it was being opened: load it again")


def probe(
    path: Path,
    options: SessionOptions,
    lately: Iterable[Call],
    *,
    limits: OpeningLimits,
    stopped: Callable[[], bool] = lambda: False,
    examine: Examine = examine,
) -> TrialResult:
    """Try an artefact in a new process. Takes about a second longer than verifying and opening it there.

    `lately`: calls to warm up. `stopped`: asked many times a second; True ends the trial. Raises the errors of
    `examine`, VerificationError if the process dies, hangs or takes too much memory, NotReadyError if stopped.
    """
    question = {
        "examine": [examine.__module__, examine.__qualname__],
        "path": str(path),
        "options": asdict(options),
        "lately": list(lately),
        "seconds": limits.seconds,
    }
    kills = kills_for_memory()
    return _read(ask_helper(answer, question, watch=_Watch(path, limits, stopped)), path, kills)


class _Watch:
    """Watches the process of a trial: lowers its priority, and raises an error that ends it at a limit."""

    def __init__(self, path: Path, limits: OpeningLimits, stopped: Callable[[], bool]) -> None:
        self._path, self._limits, self._stopped = path, limits, stopped
        self._deadline, self._memory_bytes = time.monotonic() + limits.seconds, limits.memory_bytes
        self._priority: BackgroundPriority | None = None

    def __call__(self, process: int) -> None:
        if self._priority is None:
            self._priority = BackgroundPriority(process)
        self._priority.update()
        if self._stopped():
            raise NotReadyError(f"{self._path}: its trial was ended with the server")
        if time.monotonic() > self._deadline:
            raise TookTooLongError(f"{self._path}: it was not open, verified and warm after {self._limits.seconds:g} s: {TOO_LONG}")
        taken = resident_of(process)
        if self._memory_bytes is not None and taken is not None and taken > self._memory_bytes:
            raise VerificationError(
                f"{self._path}: opening it took {taken / 2**30:.2f} GiB of memory (allowed: {self._memory_bytes / 2**30:.2f}): "
                "lower --max-batch, or export it for smaller images"
            )


def _read(outcome: Outcome, path: Path, kills: int | None) -> TrialResult:
    """`kills`: how many processes the kernel had ended before, because memory ran out."""
    if outcome.returncode:
        raise VerificationError(f"{path}: {_cause(outcome, kills)}")
    try:
        record = json.loads(outcome.answer)
    except ValueError as error:
        raise VerificationError(f"{path}: the process that tried it ended without an answer") from error
    if "error" not in record:
        return TrialResult(digest=record["digest"], signature=Signature.model_validate(record["signature"]))
    recorded = recorded_error(record)
    raise VerificationError(f"{path}: there is no memory to open it") if isinstance(recorded, MemoryError) else recorded


def _cause(outcome: Outcome, kills: int | None) -> str:
    """Say how the process died."""
    if outcome.returncode > 0:
        return f"the process that tried it failed: {outcome.last_line[:300]}"
    number = -outcome.returncode
    if number == signal.SIGKILL and kills is not None and kills != kills_for_memory():
        return "the system ended the process that tried it, for want of memory: free some, or lower --max-batch"
    name = signal.strsignal(number)
    return f"its engine ended the process that tried it, by signal {number}" + (f" ({name})" if name else "")


# ---- in the new process ----


def answer() -> None:
    """Answer the question of `probe`: examine the artefact, and write a `TrialResult` or an error."""
    answer_question(_examine)


def _examine(question: dict[str, Any]) -> dict[str, Any]:
    set_oom_score(1000)
    end_after(question["seconds"] + 5)  # the server ends it before that, if it still runs
    with suppress(ImportError, OSError, ValueError):
        resource = import_module("resource")  # POSIX only
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would be as large as the process
    module, name = question["examine"]
    examine: Examine = getattr(import_module(module), name)
    calls = tuple(call_from_json(call) for call in question["lately"])
    result = examine(Path(question["path"]), SessionOptions(**question["options"]), calls)
    return {"digest": result.digest, "signature": result.signature.model_dump(mode="json")}
