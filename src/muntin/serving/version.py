"""A version: one artefact, how it is opened, who is using it and how long it takes.

    loading -> ready -> draining -> unloaded
       |         |
       +---------+--> failed

A request takes a lease on a version when it is admitted and gives it back when it is answered. A version that is not wanted any more
drains: it admits nobody new, and its session goes with the last lease. So no answer ever comes from a session that was closed under
it, and none waits for another version to be opened.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from muntin.artifact import Manifest, Signature, open_artifact
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.engines import open_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session, Shape
from muntin.runtime.verification import replay

State = Literal["loading", "ready", "draining", "unloaded", "failed"]
CALLS = 16
"""Kinds of calls that a version remembers: those that came last."""
DENSE_ROWS, DENSE_PIXELS = 16, 1 << 20
"""Up to so many images, and so many pixels together, a batch is small: compiling for one takes 0.4 s and 17 MiB at 64 x 64."""
LONGEST_REST_S = 1.0
"""After a step of opening: on a core that others keep busy, a step takes long without having done much."""
TIMES = 64
"""Times that it remembers of each."""


class UnknownVersionError(MuntinError):
    """A version was asked for that there is not."""


class NotReadyError(MuntinError):
    """There is no version, or not this one now, that could answer."""


class RefusedError(MuntinError):
    """A sound version may not take over: it has another contract, or did worse than the one that serves."""


class TookTooLongError(VerificationError):
    """A version was not open, or not verified, in the time that it has. A machine that is less busy may do it."""


TOO_LONG = "it hangs, or this machine is too slow for all that it is compiled for: lower --max-batch"
"""Of what did not come to its end in time."""


class EngineDiedError(MuntinError):
    """The process that an engine runs in has ended, or was ended, in the midst of a call."""


class OutOfMemoryError(EngineDiedError):
    """The kernel has ended `process` for want of memory, as far as can be told: it says how many it ended, and not which."""

    def __init__(self, message: str, *, process: int = 0) -> None:
        super().__init__(message)
        self.process = process


class Call(NamedTuple):
    """What a session is asked to compute: images of a shape (B, H, W), and of them scores or labels."""

    shape: Shape
    labels: bool = False

    @property
    def pixels(self) -> int:
        """Of all images together."""
        return math.prod(self.shape)


def batch_sizes(most: int, pixels: int) -> list[int]:
    """Rows of the batches that are compiled for at the start, of images of so many pixels: every number as long as a batch is small, then
    the powers of two, up to `most`. An engine that has to take a size as it comes was 1.2 to 1.7 times slower."""
    small = min(most, DENSE_ROWS, max(1, DENSE_PIXELS // pixels))
    return sorted({*range(1, small + 1), *(1 << n for n in range(most.bit_length()))})


def starting_calls(manifest: Manifest, max_batch: int) -> tuple[Call, ...]:
    """What a version is compiled for before anybody asks: batches, as they are made, of images of the size that it was exported with."""
    if manifest.example is None or not max_batch:
        return ()
    _, height, width = manifest.example
    return tuple(Call((size, height, width), manifest.signature.task == "segment") for size in batch_sizes(max_batch, height * width))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A session that has answered a golden pair and is warm, and its artefact's signature and digest.

    `calls`: the calls that it is compiled for; `start`: those of them that are compiled for at every start, before any request.
    """

    session: Session
    signature: Signature
    digest: str
    calls: tuple[Call, ...]
    start: tuple[Call, ...] = ()


def _never() -> bool:
    return False


def _example_calls(manifest: Manifest) -> tuple[Call, ...]:
    """Scores, and labels where there are classes, of the manifest's example; empty without one."""
    if manifest.example is None:
        return ()
    scores = Call(manifest.example)
    return (scores,) if manifest.signature.task == "restore" else (scores, scores._replace(labels=True))


def open_version(
    path: Path, options: SessionOptions, calls: Iterable[Call], *, rest: float = 0.0, stopped: Callable[[], bool] = _never
) -> Opened:
    """Opens an artefact in this process, replays its smallest golden pair, and warms it up for `calls`.

    Without calls it is warmed up for scores and labels of the shape that its manifest names; the options' `shapes` are ignored.

    With `dynamic` the models of dynamic sizes are compiled as well: a size that nobody foresaw is computed as it comes. Takes what
    compiling takes, or, where the user's cache has what is compiled, a fraction of it. `rest`, above 0 where requests are answered
    meanwhile: after each step nothing is done for so many times as long as it took, and only the smallest call is computed. `stopped`:
    asked before each step. Raises what `load` raises, VerificationError where the golden scores do not come out, NotReadyError where
    stopped.
    """
    step = partial(_step, path, rest=rest, stopped=stopped)
    with step():
        session = open_session(path, replace(options, shapes=()))
    artifact = open_artifact(path)  # after it: had the directory been replaced meanwhile, its digest would say so
    calls = tuple(dict.fromkeys(calls)) or _example_calls(artifact.manifest)
    images_BHWC, scores = min(artifact.golden(), key=lambda pair: pair[0].size)
    tolerance = artifact.manifest.tolerance(session.engine, session.precision)
    classes = session.signature.task != "restore"
    with step():
        result = replay(session, images_BHWC, scores, tolerance, classes=classes)
    if not result.passed:
        allowed = "nothing is recorded" if tolerance is None else f"{tolerance.max_error:g}"
        raise VerificationError(
            f"{path}: {session.engine} in {session.precision} is {result.max_error:.3g} standard deviations off a golden pair "
            f"(allowed: {allowed}): export the artefact again"
        )
    smallest = min(calls, key=lambda call: call.pixels, default=None)
    for call in sorted(calls, key=lambda call: call.labels):
        with step():
            session.warm_up([call.shape], labels=call.labels, compute=not rest or call == smallest)
    if options.dynamic and classes:
        session.labels(images_BHWC)  # the model for scores came with the replay
    return Opened(session=session, signature=session.signature, digest=artifact.digest, calls=calls)


@contextmanager
def _step(path: Path, *, rest: float, stopped: Callable[[], bool]) -> Iterator[None]:
    if stopped():
        raise NotReadyError(f"{path}: opening it was ended with the server")
    started = time.perf_counter()
    yield
    time.sleep(min(LONGEST_REST_S, rest * (time.perf_counter() - started)))


def contract_difference(new: Signature, old: Signature, *, other_classes: bool = False) -> str:
    """In which way a client of `old` would be misled by `new`; empty where it would not.

    Task, channels, type and scale must be the same. Classes may be added at the end: a client that knows the first ones reads
    their numbers as before. Fewer, others or another order would be read as what they are not, so they need `other_classes`.
    """
    for name in ("task", "channels", "dtype", "scale"):
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours != theirs:
            return f"{name} {ours} where {theirs} is served"
    names, served = ([entry.name for entry in signature.classes] for signature in (new, old))
    if other_classes or names[: len(served)] == served:
        return ""
    number = next((number for number, (ours, theirs) in enumerate(zip(names, served, strict=False)) if ours != theirs), len(names))
    found = f'"{names[number]}"' if number < len(names) else "none"
    return f'class {number} is {found} where "{served[number]}" is served'


class Latencies:
    """Seconds of the last batches, by what was computed: the last `TIMES` of each of the last `CALLS` kinds."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._in_parts: set[Hashable] = set()  # that had to be, the last time

    def add(self, kind: Hashable, seconds: float, *, whole: bool = True) -> None:
        """`whole`: in one call."""
        if kind not in self._seconds:
            self._seconds[kind] = deque(maxlen=TIMES)
            if len(self._seconds) > CALLS:
                self._in_parts.discard(self._seconds.popitem(last=False)[0])
        self._seconds[kind].append(seconds)
        self._seconds.move_to_end(kind)
        (self._in_parts.discard if whole else self._in_parts.add)(kind)

    def of(self, kind: Hashable) -> tuple[float, ...]:
        return tuple(self._seconds.get(kind, ()))

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        """The one that came last at the end."""
        return tuple(self._seconds)

    @property
    def calls(self) -> dict[Call, int]:
        """Those kinds that a session can be warmed up for, and how many batches of each are remembered."""
        return {kind: len(seconds) for kind, seconds in self._seconds.items() if isinstance(kind, Call)}

    @property
    def examples(self) -> dict[Call, int]:
        """Those of `calls` that a session can be asked in one call, as far as is known."""
        return {call: count for call, count in self.calls.items() if call not in self._in_parts}


@dataclass(eq=False, slots=True)
class Begun:
    """A batch that a version computes since `at`, of so many rows; from `due` on it counts as one that does not come back."""

    version: Version
    rows: int
    at: float
    due: float
    overdue: bool = False
    ended: bool = False


@dataclass(eq=False, kw_only=True)
class Version:
    """One artefact under the name of its version. Its slot alone changes it, and guards it with its lock.

    `leases`: given and not yet back. `reason`: why it failed, otherwise empty. `digest` is known once it was tried, `signature` once it is
    open, and both remain when it is closed. `warm`: the calls that it was compiled for when it was opened. `begun`: the batches that it
    computes, of which `overdue` do not come back. `deaths`: of its engine, that were told.
    """

    name: str
    path: Path
    state: State = "loading"
    reason: str = ""
    digest: str = ""
    leases: int = 0
    warm: frozenset[Call] = frozenset()
    start: frozenset[Call] = frozenset()
    latencies: Latencies = field(default_factory=Latencies, repr=False)
    begun: set[Begun] = field(default_factory=set, repr=False)
    overdue: int = 0
    deaths: int = 0
    _signature: Signature | None = field(default=None, repr=False)
    _session: Session | None = field(default=None, repr=False)

    @property
    def session(self) -> Session:
        """Who has a lease finds it open. Raises NotReadyError where it is not."""
        if self._session is None:
            raise NotReadyError(f"version {self.name} is {self.state}: take a lease on one that is ready")
        return self._session

    @property
    def signature(self) -> Signature:
        """Raises NotReadyError before it is open."""
        if self._signature is None:
            raise NotReadyError(f"version {self.name} is {self.state}: its signature is known once it is open")
        return self._signature

    @property
    def open(self) -> bool:
        return self._session is not None

    @property
    def was_open(self) -> bool:
        """Whether it is open now, or has been."""
        return self._signature is not None

    @property
    def able(self) -> bool:
        """Whether it is open, and its engine can be asked."""
        session = self._session
        return session is not None and session.able

    @property
    def dead(self) -> bool:
        """Whether its engine cannot be asked before it has been begun again, which was tried in vain (`Session.dead`)."""
        session = self._session
        return session is not None and session.dead

    def opened(self, opened: Opened) -> None:
        self._session, self._signature, self.digest, self.state = opened.session, opened.signature, opened.digest, "ready"
        self.warm, self.start = frozenset(opened.calls), frozenset(opened.start)

    def new_death(self) -> str:
        """What is known of the last death of its engine, if it was not told; empty: none was."""
        session = self._session
        if session is None or session.deaths == self.deaths:
            return ""
        self.deaths = session.deaths
        return session.last_death

    def close(self) -> Session | None:
        """Lets go of the session, and returns it: to be dropped where nobody waits for it."""
        session, self._session = self._session, None
        return session
