"""Try a version in a process of its own, before it may come near the version that serves.

An engine is native code that runs any graph: it may crash, hang, or take all memory. The process that tries a version has a low priority,
limits of time and memory, and is the first that the kernel ends if memory runs out. It verifies the artefact, opens the model and warms it
up as for serving. The compiled models stay in the user's cache, so that the process that serves it (`remote_session`) opens it quickly.
That is another process, because raising a low priority takes privileges that few servers have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from muntin.artifact import Signature
from muntin.errors import VerificationError
from muntin.runtime.host.hardware import memory_gib
from muntin.runtime.host.helper_process import answer_question, ask_helper
from muntin.runtime.host.memory import kills_for_memory
from muntin.runtime.options import SessionOptions
from muntin.runtime.verification.artifact import verify
from muntin.serving.worker.channel import call_from_json
from muntin.serving.worker.child import end_after, set_oom_score
from muntin.serving.worker.launch import OpeningWatch, checked_answer, describe_end
from muntin.serving.worker.opening import Call, Opened, open_version

OPENING_S = 300.0
"""Seconds that the trial of a version may take, and opening it."""
MEMORY_SHARE = 0.5
"""Share of the memory that this process may use at which a trial is ended: two versions are in memory during a swap. Linux only."""
NICENESS = 5
"""Niceness added to the process of a trial: a third of the usual weight on Linux. With more, a load takes minutes on busy cores."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Digest and signature of an artefact that passed its trial."""

    digest: str
    signature: Signature


Examine = Callable[[Path, SessionOptions, tuple[Call, ...]], Opened]
"""The steps of a trial: a function of a module that can be imported. Its last argument: calls to warm up."""


def examine(path: Path, options: SessionOptions, lately: tuple[Call, ...]) -> Opened:
    """Verify an artefact, and open it as for serving. Raises the errors of both, and VerificationError for a failed check."""
    result = verify(path, options)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{path}: {result.problems[0]}{more}")
    return open_version(path, options, lately, digest=result.digests["manifest.json"])


def probe(
    path: Path,
    options: SessionOptions,
    lately: Iterable[Call],
    *,
    seconds: float = OPENING_S,
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
        "seconds": seconds,
    }
    total_gib, kills = memory_gib(), kills_for_memory()
    memory_bytes = None if total_gib is None else MEMORY_SHARE * total_gib * 2**30
    limit = OpeningWatch(path, seconds, stopped, memory_bytes=memory_bytes)

    def watch(process: int) -> None:
        _lower_priority(process)
        limit(process)

    outcome = ask_helper(answer, question, watch=watch)
    if outcome.returncode:
        end, out_of_memory = describe_end(outcome.returncode, kills)
        advice = ": free some, or lower --max-batch" if out_of_memory else f": {outcome.last_line[:300]}" if outcome.returncode > 0 else ""
        raise VerificationError(f"{path}: its engine ended the process that tried it: {end}{advice}")
    try:
        record = json.loads(outcome.answer)
    except ValueError as error:
        raise VerificationError(f"{path}: the process that tried it ended without an answer") from error
    result = checked_answer(path, record)
    return TrialResult(digest=result["digest"], signature=Signature.model_validate(result["signature"]))


def _lower_priority(process: int) -> None:
    """Set the niceness of a process, relative to this one's. Its threads inherit it. Does nothing on Windows."""
    if hasattr(os, "setpriority"):
        with suppress(OSError):  # it has ended, or a sandbox forbids it
            os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


# ---- in the new process ----


def answer() -> None:
    """Answer the question of `probe` with the fields of a `TrialResult`, or an error."""
    answer_question(_examine)


def _examine(question: dict[str, Any]) -> dict[str, Any]:
    set_oom_score(1000)
    end_after(question["seconds"] + 5)  # the server ends it before that, if it still runs
    module, name = question["examine"]
    examine: Examine = getattr(import_module(module), name)
    calls = tuple(call_from_json(call) for call in question["lately"])
    opened = examine(Path(question["path"]), SessionOptions(**question["options"]), calls)
    return {"digest": opened.digest, "signature": opened.signature.model_dump(mode="json")}
