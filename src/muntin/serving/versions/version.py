"""A version: one artefact, its session, the leases on it and the times of its calls.

    loading -> ready -> draining -> unloaded
       |         |
       +---------+--> failed

A request takes a lease on a version when it is admitted and gives it back when it is answered. A draining version admits no new request;
its session is closed with the last lease.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from muntin.artifact import AnySignature, Signature, TensorSignature
from muntin.errors import MuntinError
from muntin.runtime.session import Session
from muntin.serving.worker.calls import Call
from muntin.serving.worker.liveness import IN_THIS_PROCESS, Liveness, liveness_of
from muntin.serving.worker.opening import NotReadyError, Opened

State = Literal["loading", "ready", "draining", "unloaded", "failed"]
CALLS = 16
"""Kinds of calls that a version remembers, the most recent ones."""
TIMES = 64
"""Times that a version remembers of each kind."""


class UnknownVersionError(MuntinError):
    """No version has the requested name."""


class RefusedError(MuntinError):
    """A version that works may not take over: its contract differs, or it did worse than the current version."""


def contract_difference(new: AnySignature, old: AnySignature) -> str:
    """Describe how `new` would mislead a client of `old`; empty where it would not.

    Images: task, channels, type and scale must be the same, and so must the first classes. Classes may be added at the end. Sizes may be
    added. Named tensors: the inputs and the first outputs must be the same. Outputs may be added at the end.
    """
    if isinstance(new, Signature) and isinstance(old, Signature):
        return _image_difference(new, old)
    if isinstance(new, TensorSignature) and isinstance(old, TensorSignature):
        return _tensor_difference(new, old)
    return f"task {new.task} where {old.task} is served"


def covers(other: AnySignature, signature: AnySignature) -> bool:
    """Return whether a version of the signature `other` takes all calls of a version of `signature`, of the same model."""
    if isinstance(other, Signature) and isinstance(signature, Signature):
        return other.sizes.cover(signature.sizes)
    return not contract_difference(other, signature)


def _image_difference(new: Signature, old: Signature) -> str:
    for name in ("task", "channels", "dtype", "scale"):
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours != theirs:
            return f"{name} {ours} where {theirs} is served"
    if not new.sizes.cover(old.sizes):
        return f"images of {new.sizes.text} where {old.sizes.text} is served"
    names, served = ([entry.name for entry in signature.classes] for signature in (new, old))
    if names[: len(served)] == served:
        return ""
    number = next((number for number, (ours, theirs) in enumerate(zip(names, served, strict=False)) if ours != theirs), len(names))
    name = f'"{names[number]}"' if number < len(names) else "none"
    return f'class {number} is {name} where "{served[number]}" is served'


def _tensor_difference(new: TensorSignature, old: TensorSignature) -> str:
    if len(new.inputs) != len(old.inputs):
        return f"{len(new.inputs)} inputs where {len(old.inputs)} are served"
    for kind, ours, theirs in (("input", new.inputs, old.inputs), ("output", new.outputs, old.outputs)):
        for number, due in enumerate(theirs):
            spec = ours[number] if number < len(ours) else None
            if spec != due:
                text = "none" if spec is None else f"{spec.name} {spec.text}"
                return f"{kind} {number} is {text} where {due.name} {due.text} is served"
    if new.batch != old.batch:
        return f"rows along {new.batch or 'no dimension'} where {old.batch or 'no dimension'} is served"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return str(error).partition("\n")[0][:300]


class Latencies:
    """Seconds of the last `TIMES` batches of each of the last `CALLS` kinds of calls."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Call, deque[float]] = OrderedDict()

    def add(self, call: Call, seconds: float) -> None:
        self._seconds.setdefault(call, deque(maxlen=TIMES)).append(seconds)
        self._seconds.move_to_end(call)
        if len(self._seconds) > CALLS:
            self._seconds.popitem(last=False)

    def forget(self, call: Call) -> None:
        self._seconds.pop(call, None)

    def of(self, call: Call) -> tuple[float, ...]:
        return tuple(self._seconds.get(call, ()))

    def count(self, call: Call) -> int:
        """Number of remembered batches of a kind."""
        return len(self._seconds.get(call, ()))

    @property
    def calls(self) -> tuple[Call, ...]:
        """The remembered kinds, the most recent last."""
        return tuple(self._seconds)


@dataclass(eq=False, slots=True)
class Begun:
    """A batch of `rows` that a version computes since the time `at`. From the time `due` on it counts as failed."""

    version: Version
    rows: int
    at: float
    due: float
    overdue: bool = False


@dataclass(eq=False, kw_only=True)
class Version:
    """One artefact under the name of its version. Only its slot changes it, under its lock.

    `reason`: of its failure; while it loads, the present step. `digest`, `signature` and `lineage` are set once it was opened, and
    remain.
    `compiled_sizes`: those that it is compiled for (`Call.size`). `begun`: the batches that it computes.
    """

    name: str
    path: Path
    state: State = "loading"
    reason: str = ""
    digest: str = ""
    lineage: str = ""
    leases: int = 0
    compiled_sizes: set[Hashable] = field(default_factory=set)
    latencies: Latencies = field(default_factory=Latencies, repr=False)
    begun: set[Begun] = field(default_factory=set, repr=False)
    _deaths: int = 0
    _reported_deaths: int = 0
    _signature: AnySignature | None = field(default=None, repr=False)
    _session: Session | None = field(default=None, repr=False)

    @property
    def session(self) -> Session:
        """The open session. Raises NotReadyError if it is closed."""
        if self._session is None:
            raise NotReadyError(f"version {self.name} is {self.state}: take a lease on one that is ready")
        return self._session

    @property
    def signature(self) -> AnySignature:
        """The signature, also after closing. Raises NotReadyError before the version is open."""
        if self._signature is None:
            raise NotReadyError(f"version {self.name} is {self.state}: its signature is known once it is open")
        return self._signature

    @property
    def open(self) -> bool:
        return self._session is not None

    @property
    def liveness(self) -> Liveness:
        return IN_THIS_PROCESS if self._session is None else liveness_of(self._session)

    @property
    def able(self) -> bool:
        """True if it is open and its engine accepts calls."""
        return self._session is not None and self.liveness.able

    def progressed(self, step: str) -> None:
        """Set the step of loading that `index` shows."""
        if self.state == "loading":
            self.reason = step

    def opened(self, opened: Opened) -> None:
        self.reason = ""
        self._session, self._signature, self.digest, self.state = opened.session, opened.signature, opened.digest, "ready"
        self.lineage = opened.lineage
        self.compiled_sizes = {call.size for call in opened.calls}

    @property
    def deaths(self) -> int:
        return self._deaths if self._session is None else self.liveness.deaths

    def new_death(self) -> str:
        """Describe the last death of its engine if it was not reported yet; otherwise empty."""
        engine = self.liveness
        if engine.deaths in (0, self._reported_deaths):
            return ""
        self._reported_deaths = engine.deaths
        return engine.last_death

    def close(self) -> Session | None:
        """Give up the session and return it, for the caller to close."""
        self._deaths = self.deaths
        session, self._session = self._session, None
        return session
