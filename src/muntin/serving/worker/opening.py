"""Opening an artefact for serving: load, check, warm up. Runs in the server's process or in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from muntin.artifact import AnySignature, Artifact, TensorPair, open_artifact
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.session import Session
from muntin.runtime.verification.artifact import verify_session
from muntin.runtime.verification.golden import replay
from muntin.serving.worker.calls import Call


class NotReadyError(MuntinError):
    """No version, or not the requested one, can answer now; or opening it was ended."""


class TookTooLongError(VerificationError):
    """A version was not opened or verified within its time limit. It may succeed on a less busy machine."""


class EngineDiedError(MuntinError):
    """The process that an engine runs in ended, or was ended, during a call."""


class OutOfMemoryError(EngineDiedError):
    """The kernel ended the engine's process because memory ran out. A deduction: it reports how many processes it ended, not which."""


REPLACED = "it was replaced meanwhile: load it again"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A warm session that has reproduced a golden pair.

    `calls`: those that it is compiled for. `compile_rest`: compiles for those that are left, where `open_version` was asked to leave some.
    `lineage`: what `muntin update` wrote into the manifest about its origin and the gate's decision, in a line.
    """

    session: Session
    signature: AnySignature
    digest: str
    calls: tuple[Call, ...]
    compile_rest: Callable[[], None] = lambda: None
    lineage: str = ""


def open_version(
    path: Path,
    options: SessionOptions,
    calls: Iterable[Call],
    *,
    digest: str = "",
    verify: bool = False,
    hurry: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Opened:
    """Open an artefact in this process, check it, and warm it up for `calls`.

    `verify`: check it as `muntin verify` does; False: replay its smallest golden pair. `hurry`: compile for the smallest call of each size
    only, and leave the others to `Opened.compile_rest`. `digest`: required digest of the artefact; empty: any. `progress`: called with
    the name of each step when it begins.

    Costs compiling, or a fraction of it where the user's cache holds the compiled model. With `dynamic` the models of dynamic sizes are
    compiled as well; the options' `shapes` and `dims` are ignored. Raises the errors of `load`, and VerificationError for a failed check
    or another digest.
    """
    progress("opening")
    artifact = open_artifact(path)
    if digest and artifact.digest != digest:
        raise VerificationError(f"{path}: {REPLACED}")
    session = open_session(artifact, replace(options, shapes=(), dims=()))
    progress("verifying")
    if verify:
        _verify(session, artifact, allow_fallbacks=options.engine != DEFAULT_ENGINE)
    else:
        _replay(session, artifact)
    calls = tuple(dict.fromkeys(calls))
    steps: list[Callable[[], object]] = [partial(call.warm_up, session) for call in sorted(calls, key=lambda call: call.order)]
    if options.dynamic and session.images and session.signature.answer.argmax:
        steps.append(partial(session.labels, _smallest_pair(artifact)[0]["images"]))  # the checks compiled the dynamic model for scores
    first = len({call.size for call in calls}) if hurry else len(steps)
    for number, step in enumerate(steps[:first], 1):
        progress(f"compiling, {number} of {first}")
        step()

    def compile_rest() -> None:
        for step in steps[first:]:
            step()

    return Opened(session=session, signature=session.signature, digest=artifact.digest, calls=calls, compile_rest=compile_rest)


def _smallest_pair(artifact: Artifact) -> TensorPair:
    return min(artifact.golden(), key=lambda pair: sum(tensor.size for tensor in pair[0].values()))


def _verify(session: Session, artifact: Artifact, *, allow_fallbacks: bool) -> None:
    result = verify_session(session, artifact, allow_fallbacks=allow_fallbacks)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{artifact.path}: {result.problems[0]}{more}")


def _replay(session: Session, artifact: Artifact) -> None:
    tolerance = artifact.manifest.tolerance(session.engine, session.precision)
    for result in replay(session, _smallest_pair(artifact), tolerance):
        if not result.passed:
            raise VerificationError(
                f"{artifact.path}: {session.engine} in {session.precision} differs from its reference: {result.problem}: export it again"
            )
