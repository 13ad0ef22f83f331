"""Opening an artefact for serving: load, check, warm up. Runs in the server's process or in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact, Manifest, Signature, open_artifact
from muntin.errors import DataError, MuntinError, VerificationError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.session import Session, Shape
from muntin.runtime.verification.artifact import replay, verify_session

DENSE_ROWS, DENSE_PIXELS = 16, 1 << 20
"""Largest batch, in images and in pixels of all images, up to which every batch size is compiled for (0.4 s and 17 MiB each at 64 x 64)."""


class NotReadyError(MuntinError):
    """No version, or not the requested one, can answer now; or opening it was ended."""


class TookTooLongError(VerificationError):
    """A version was not opened or verified within its time limit. It may succeed on a less busy machine."""


class EngineDiedError(MuntinError):
    """The process that an engine runs in ended, or was ended, during a call."""


class OutOfMemoryError(EngineDiedError):
    """The kernel ended the engine's process because memory ran out. A deduction: it reports how many processes it ended, not which."""


class Call(NamedTuple):
    """A kind of call of a session: images of a shape (B, H, W), computed to scores or to labels."""

    shape: Shape
    labels: bool = False


def batch_sizes(most: int, pixels: int) -> list[int]:
    """Batch sizes up to `most` to compile for, for images of `pixels`: every number while a batch is small, then the powers of two.

    A size that was not compiled for was 1.2 to 1.7 times slower.
    """
    small = min(most, DENSE_ROWS, max(1, DENSE_PIXELS // pixels))
    return sorted({*range(1, small + 1), *(1 << n for n in range(most.bit_length()))})


def starting_calls(manifest: Manifest, max_batch: int, sizes: Iterable[tuple[int, int]] = ()) -> tuple[Call, ...]:
    """Calls that a version is compiled for: batches of images of the size that it was exported with, and of `sizes` (height, width).

    Of segmentations these are batches for labels, and one image for scores, in whose calls batches for scores are computed. Raises
    DataError for a size that the model does not take.
    """
    allowed = manifest.signature.sizes
    for height, width in sizes:
        if not allowed.takes(height, width):
            rows, columns = allowed.at_least(height, width)
            raise DataError(f"--sizes {height}x{width}: the model takes {allowed.text}: give {rows}x{columns}, or leave it out")
    exported = () if manifest.example is None else (manifest.example[1:],)
    segments = manifest.signature.task == "segment"
    calls = []
    for height, width in dict.fromkeys((*exported, *sizes)) if max_batch else ():
        calls += [Call((rows, height, width), segments) for rows in batch_sizes(max_batch, height * width)]
        if segments:
            calls.append(Call((1, height, width), False))
    return tuple(calls)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A warm session that has reproduced a golden pair.

    `calls`: those that it is compiled for. `compile_rest`: compiles for those that are left, where `open_version` was asked to leave some.
    """

    session: Session
    signature: Signature
    digest: str
    calls: tuple[Call, ...]
    compile_rest: Callable[[], None] = lambda: None


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
    compiled as well; the options' `shapes` are ignored. Raises the errors of `load`, and VerificationError for a failed check or another
    digest.
    """
    progress("opening")
    session = open_session(path, replace(options, shapes=()))
    artifact = open_artifact(path)
    if digest and artifact.digest != digest:
        session.close()
        raise VerificationError(f"{path}: it was replaced meanwhile: load it again")
    progress("verifying")
    if verify:
        _verify(session, artifact, allow_fallbacks=options.engine != DEFAULT_ENGINE)
    else:
        _replay(session, artifact)
    calls = tuple(dict.fromkeys(calls))
    steps: list[Callable[[], object]] = [
        partial(session.warm_up, [call.shape], labels=call.labels)
        for call in sorted(calls, key=lambda call: (call.shape[0], not call.labels))
    ]
    if options.dynamic and session.signature.task != "restore":  # the checks compiled the dynamic model for scores
        steps.append(partial(session.labels, _smallest_pair(artifact)[0]))
    first = len({call.shape[1:] for call in calls}) if hurry else len(steps)
    for number, step in enumerate(steps[:first], 1):
        progress(f"compiling, {number} of {first}")
        step()

    def compile_rest() -> None:
        for step in steps[first:]:
            step()

    return Opened(session=session, signature=session.signature, digest=artifact.digest, calls=calls, compile_rest=compile_rest)


def _smallest_pair(artifact: Artifact) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    return min(artifact.golden(), key=lambda pair: pair[0].size)


def _verify(session: Session, artifact: Artifact, *, allow_fallbacks: bool) -> None:
    result = verify_session(session, artifact, allow_fallbacks=allow_fallbacks)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{artifact.path}: {result.problems[0]}{more}")


def _replay(session: Session, artifact: Artifact) -> None:
    tolerance = artifact.manifest.tolerance(session.engine, session.precision)
    result = replay(session, *_smallest_pair(artifact), tolerance, classes=session.signature.task != "restore")
    if not result.passed:
        allowed = "nothing is recorded" if tolerance is None else f"{tolerance.max_error:g}"
        raise VerificationError(
            f"{artifact.path}: {session.engine} in {session.precision} is {result.max_error:.3g} standard deviations off a golden pair "
            f"(allowed: {allowed}): export the artefact again"
        )
