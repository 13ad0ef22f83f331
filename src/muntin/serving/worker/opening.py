"""Opening an artefact for serving: load, replay a golden pair, warm up. Runs in the server's process or in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from muntin.artifact import Manifest, Signature, open_artifact
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session, Shape
from muntin.runtime.verification.artifact import replay

DENSE_ROWS, DENSE_PIXELS = 16, 1 << 20
"""Largest batch, in images and in pixels of all images, up to which every batch size is compiled for (0.4 s and 17 MiB each at 64 x 64)."""
LONGEST_REST_S = 1.0
"""Longest pause after a step of opening, seconds: on a busy core a step takes long without having done much."""


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

    @property
    def pixels(self) -> int:
        """Pixels of all images together."""
        return math.prod(self.shape)


def batch_sizes(most: int, pixels: int) -> list[int]:
    """Batch sizes up to `most` to compile for, for images of `pixels`: every number while a batch is small, then the powers of two.

    A size that was not compiled for was 1.2 to 1.7 times slower.
    """
    small = min(most, DENSE_ROWS, max(1, DENSE_PIXELS // pixels))
    return sorted({*range(1, small + 1), *(1 << n for n in range(most.bit_length()))})


def starting_calls(manifest: Manifest, max_batch: int) -> tuple[Call, ...]:
    """Calls that a version is compiled for before its first request: batches of images of the size that it was exported with."""
    if manifest.example is None or not max_batch:
        return ()
    _, height, width = manifest.example
    return tuple(Call((size, height, width), manifest.signature.task == "segment") for size in batch_sizes(max_batch, height * width))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A warm session that has reproduced a golden pair.

    `calls`: all that it is compiled for; `start`: those of them that every start compiles for, before any request.
    """

    session: Session
    signature: Signature
    digest: str
    calls: tuple[Call, ...]
    start: tuple[Call, ...] = ()


def open_version(path: Path, options: SessionOptions, calls: Iterable[Call], *, rest: float = 0.0, digest: str = "") -> Opened:
    """Open an artefact in this process, replay its smallest golden pair, and warm it up for `calls`.

    Costs compiling, or a fraction of it where the user's cache holds the compiled model. With `dynamic` the models of dynamic sizes are
    compiled as well; the options' `shapes` are ignored. `rest`: after each step, pause for `rest` times its duration; above 0 only the
    smallest call is computed, because requests are answered meanwhile. `digest`: required digest of the artefact; empty: any. Raises the
    errors of `load`, and VerificationError for a wrong golden pair or another digest.
    """
    started = time.perf_counter()

    def pause() -> None:
        nonlocal started
        time.sleep(min(LONGEST_REST_S, rest * (time.perf_counter() - started)))
        started = time.perf_counter()

    session = open_session(path, replace(options, shapes=()))
    pause()
    artifact = open_artifact(path)
    if digest and artifact.digest != digest:
        session.close()
        raise VerificationError(f"{path}: it was replaced meanwhile: load it again")
    calls = tuple(dict.fromkeys(calls))
    images_BHWC, scores = min(artifact.golden(), key=lambda pair: pair[0].size)
    tolerance = artifact.manifest.tolerance(session.engine, session.precision)
    classes = session.signature.task != "restore"
    result = replay(session, images_BHWC, scores, tolerance, classes=classes)
    pause()
    if not result.passed:
        allowed = "nothing is recorded" if tolerance is None else f"{tolerance.max_error:g}"
        raise VerificationError(
            f"{path}: {session.engine} in {session.precision} is {result.max_error:.3g} standard deviations off a golden pair "
            f"(allowed: {allowed}): export the artefact again"
        )
    smallest = min(calls, key=lambda call: call.pixels, default=None)
    for call in sorted(calls, key=lambda call: call.labels):
        session.warm_up([call.shape], labels=call.labels, compute=not rest or call == smallest)
        pause()
    if options.dynamic and classes:
        session.labels(images_BHWC)  # the replay compiled the dynamic model for scores
    return Opened(session=session, signature=session.signature, digest=artifact.digest, calls=calls)
