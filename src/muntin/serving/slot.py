"""The slot: which version of a model answers, and how one takes another's place without anybody noticing.

    load:  probe elsewhere -> open here -> same contract? -> canary, shadow -> flip -> the old one stays warm -> it drains, it goes
                                                                |                        |
                                                             refused                 rolled back

The flip changes one reference under a lock. Requests hold leases, so those that were admitted before it are answered by the old version
and those after it by the new one; nothing waits, nothing is closed under anybody. While the old version stays warm, a batch that fails on
the new one is computed by it (`fallback`; `executor` does so): a version whose engine dies is sent back, and no request is lost by it. One
whose engine does not come back is sent back, too, and what waits for it is computed by another one. A slot knows no HTTP; what it decides
by is in `rollout`. Threads may share it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from threading import Condition, Event, Lock
from types import TracebackType
from typing import Literal, Self

from muntin.artifact import Signature
from muntin.errors import DataError, MuntinError, VerificationError
from muntin.runtime.session import Session
from muntin.serving.disposal import dispose
from muntin.serving.liveness import liveness_of
from muntin.serving.loader import Loader
from muntin.serving.rollout import Rollout, Tally, Verdict, judge
from muntin.serving.telling import tell_nobody, told_safely
from muntin.serving.version import (
    Begun,
    Call,
    NotReadyError,
    Opened,
    RefusedError,
    State,
    UnknownVersionError,
    Version,
    contract_difference,
)
from muntin.text import plain

HISTORY = 8
"""Versions that failed or went, that `index` still shows."""
_POLL_S = 0.05
_BUSY_S = 1.0
_AGAIN_S = 0.1
"""Between two tries to interrupt what does not come back."""


class _Changing:
    """The lock. After it, what happened is told, and the sessions that nobody uses are dropped. Every request takes it thrice."""

    __slots__ = ("_after", "_lock")

    def __init__(self, lock: Condition, after: Callable[[], None]) -> None:
        self._lock, self._after = lock, after

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._after()


class Lease:
    """The right to use a version until it is given back. A context manager; giving it back twice is the same as once."""

    def __init__(self, version: Version, release: Callable[[Version], None]) -> None:
        self.version = version
        self._release: Callable[[Version], None] | None = release
        self._lock = Lock()

    def release(self) -> None:
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release(self.version)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One version of the model `name`. `state`: a version's, or "unable" where its engine cannot be asked for now. `reason`: what part it
    has now, or why it has none."""

    name: str
    version: str
    state: State | Literal["unable"]
    reason: str


def _never(version: Version | None) -> bool:
    return False


class Slot:
    """The versions of one model: the current one, perhaps a candidate for its place, and perhaps the previous one, still warm.

    `loader`: opens versions. `other_classes`: a new version may have other classes in place of those that are served. `clock`: seconds.
    `random`: a number from 0 up to 1, by which requests are drawn for a candidate. `notify` is told in a line what the slot
    does by itself: who takes over, who is sent back and why. It is called on the thread that came by, and must not call the slot; what it
    raises is reported (`told_safely`), and nothing else.
    """

    def __init__(
        self,
        name: str,
        loader: Loader,
        *,
        rollout: Rollout,
        other_classes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        notify: Callable[[str], None] = tell_nobody,
    ) -> None:
        self.name = name
        self.rollout = rollout
        self._loader = loader
        self._other_classes = other_classes
        self.clock = clock
        self._random = random
        self._notify = told_safely(notify)
        self._one_load = Lock()
        self._closed = Event()
        self._changed = Condition(Lock())  # its lock guards what follows, and all that its versions hold
        self._versions: list[Version] = []
        self._current: Version | None = None
        self._candidate: Version | None = None
        self._previous: Version | None = None
        self._trial: Tally | None = None  # of the candidate
        self._probation: Tally | None = None  # of the current version, as long as there is a previous one
        self._asked = -inf  # when a batch was last begun or computed
        self._due = inf  # not before this a batch is overdue
        self._gone: list[Session] = []
        self._stuck: list[tuple[Session, float]] = []
        self._interrupted_at = -inf
        self._lines: list[str] = []
        self._deaths: Counter[str] = Counter()  # of engines of sessions that went, by version

    # ---- requests ----

    def lease(self, version: str | None = None, *, canary: bool = True) -> Lease:
        """A lease on the version that a new request is for: the current one, for a canary's share of requests the candidate.

        `version`: on this one instead. `canary`: False: on the current one, for who asks for nothing to be computed.
        Raises UnknownVersionError where there is none of this name, NotReadyError where it cannot answer.
        """
        with self._changing():
            self._settle_by_time()
            if version is not None:
                return self._lend(self._able(self._named(version)))
            if canary and self._candidate is not None and self._candidate.able and self._random() < self.rollout.canary:
                return self._lend(self._candidate)
            if self._current is None:
                raise NotReadyError(f"{self.name}: no version is ready: load one, or ask again when it is open")
            return self._lend(self._able(self._current))

    @property
    def shadowed(self) -> bool:
        """Whether there is a candidate that computes again what was answered."""
        return self._candidate is not None and self.rollout.shadow > 0

    def shadow(self, answered: Version | None) -> Lease | None:
        """After a batch was answered: a lease on the candidate, for its share of them. `observe_shadow` takes what came of it.

        `answered`: the version that computed the answer. None unless that is the current one: what a candidate computed as a canary
        would be compared with itself, and what another one did says nothing of whether the candidate can take the current one's place.
        """
        with self._changing():
            if self._candidate is None or answered is not self._current or self._random() >= self.rollout.shadow:
                return None
            return self._lend(self._candidate)

    def fallback(self, version: Version) -> Lease | None:
        """A lease on a version that can compute what failed on this one; None where there is none.

        From a candidate, or a version that is going, to the current one, from that to the previous one: never back, so whoever goes on
        until there is none comes to an end.
        """
        with self._changing():
            if version is self._previous:
                return None
            other = self._previous if version is self._current else self._current
            return None if other is None else self._lend(other)

    def hangs(self, version: Version) -> bool:
        """Whether it computes a batch that does not come back."""
        if self.clock() >= self._due:
            self.settle()
        return version.overdue > 0

    def interrupt(self, since: float) -> bool:
        """Ends calls that do not come back, where that can be done; whether any was ended since then."""
        self.settle()
        return self._interrupted_at >= since

    def begin(self, version: Version, *, rows: int, within: float = inf) -> Begun:
        """A batch that is computed by a version from now on, which stays open until `end`, or `observe`, is told of it.

        `within`: seconds after which it counts as one that does not come back: as failed, and its version as one that hangs.
        """
        now = self.clock()
        begun = Begun(version, rows, now, now + within)
        with self._changed:  # there is nothing to tell
            self._asked = now
            self._due = min(self._due, begun.due)
            version.leases += 1
            version.begun.add(begun)
        return begun

    def end(self, begun: Begun) -> None:
        """It came back. Telling so again changes nothing."""
        if not begun.ended:
            with self._changing():
                self._end(begun)

    def observe(
        self,
        version: Version,
        *,
        rows: int,
        seconds: float = 0.0,
        error: BaseException | None = None,
        call: Call | None = None,
        begun: Begun | None = None,
        whole: bool = True,
    ) -> None:
        """Counts a batch of `rows` images that took `seconds`, or failed with `error`; judges the version if it is on trial.

        `call`: what was computed. Times are compared among equal calls (without it: among batches of as many images), and the next version
        is warmed up for the last of them, but not where it was not computed as a `whole`. A DataError is the caller's, and no failure.
        `begun`: ends with it, and was counted already if it was overdue.
        """
        failure = None if isinstance(error, DataError) else error
        with self._changing():
            if death := version.new_death():
                self._lines.append(f"version {version.name}: {death}")
            if begun is not None:
                self._end(begun)
                if begun.overdue:
                    return
            self._asked = self.clock()
            if error is None:
                version.latencies.add(rows if call is None else call, seconds, whole=whole)
            if (tally := self._tally(version)) is not None:
                tally.batches += 1
                tally.rows += rows
                if failure is not None:
                    tally.failed += rows
                    tally.why = tally.why or _said(failure)
            self._settle()

    def observe_shadow(
        self,
        version: Version,
        *,
        beside: Version,
        agreement: float | None,
        seconds: float,
        rows: int,
        error: BaseException | None = None,
        call: Call | None = None,
        begun: Begun | None = None,
    ) -> None:
        """Counts what a candidate made of images that `beside` had answered. `agreement`: `label_agreement` of the two, None where there
        is none to tell; it says nothing any more once that is not the current version."""
        with self._changing():
            compared = agreement is not None and error is None and beside is self._current
            if version is self._candidate and self._trial is not None and agreement is not None and compared:
                self._trial.compared += rows
                self._trial.agreed += agreement * rows
        self.observe(version, seconds=seconds, rows=rows, error=error, call=call, begun=begun)

    # ---- versions ----

    @property
    def ready(self) -> bool:
        """Whether a request can be admitted."""
        current = self._current
        return current is not None and current.able

    @property
    def current(self) -> Version | None:
        """The version that answers, for what describes the model; to compute with it, take a lease."""
        return self._current

    @property
    def open(self) -> tuple[Version, ...]:
        """The versions that are in service: the current one, a candidate, the previous one."""
        return self._in_service()

    def deaths(self) -> dict[str, int]:
        """How often engines have died, by the names of the versions in service and of those that went after a death: it never falls."""
        with self._changed:  # there is nothing to tell
            found = self._deaths.copy()
            for version in self._versions:
                if version.open:
                    found[version.name] += version.liveness.deaths
            return dict(found)

    @property
    def busy(self) -> bool:
        """Whether a batch was begun or computed within the last second."""
        return self.clock() - self._asked < _BUSY_S

    def index(self) -> tuple[IndexEntry, ...]:
        """Every version there is, and the last that failed or went; those that came last at the end.

        One of a name, since an artefact that is loaded again keeps its own: the one in service, the current one first, else the last.
        """
        with self._changing():
            self._settle_by_time()
            shown = {version.name: version for version in (*self._versions, *reversed(self._in_service()))}
            return tuple(self._entry(version) for version in shown.values())

    def last(self, name: str) -> Version | None:
        """The version of this name that was loaded last, whatever became of it, if that is not too long ago."""
        with self._changing():
            return self._last(name)

    def load(self, path: str | Path, name: str, *, unless: Callable[[Version | None], bool] = _never) -> Version:
        """Brings a version to serve: blocks until it does, on whichever thread calls; a second call waits for the first.

        It is tried in another process, opened here, warmed up for what the current version is asked, compared by contract, and, where the
        rollout says so and anybody asks anything, tried beside the current version. Whatever fails raises a MuntinError that names it, and
        the current version goes on as if nothing had been. After it takes over it may still be rolled back.

        `unless`: asked of the last version of this name when those that were loaded before have come to their ends, and nothing is
        loaded where it says so: NotReadyError.
        """
        with self._one_load:
            if unless(self.last(name)):
                raise NotReadyError(f"{self.name}: version {name} was loaded meanwhile")
            version = Version(name=name, path=Path(path))
            lately = self._begin(version)
            try:
                self._open(version, lately)
                self._await_verdict(version)
            except BaseException as error:
                with self._changing():
                    if version.state == "loading":
                        self._fail(version, str(error) or type(error).__name__)
                if isinstance(error, MuntinError) or not isinstance(error, Exception):
                    raise
                raise VerificationError(f"{path}: it cannot be opened here ({type(error).__name__}: {_first_line(error)})") from error
            return version

    def unload(self, name: str | None = None) -> None:
        """Takes every version of a name out of service; None: all of them. Who has a lease is still answered.

        In the place of the current one comes the previous one if it is still warm, else the candidate, else none: then the slot is not
        ready. Raises UnknownVersionError where there is none of this name, NotReadyError where it is not in service.
        """
        with self._changing():
            if name is not None:
                self._named(name)
            # What would come in the current one's place goes before it.
            for version in (self._candidate, self._previous, self._current):
                if version is not None and name in (None, version.name):
                    self._take_out(version)

    def settle(self) -> None:
        """Ends what time has ended. All that requests call does so too: this is for quiet hours."""
        with self._changing():
            self._settle_by_time()

    @property
    def closed(self) -> bool:
        """Whether it loads nothing any more."""
        return self._closed.is_set()

    def end_loads(self) -> None:
        """Ends a load in progress, a trial too, and begins none any more. The version that serves goes on."""
        self._closed.set()
        with self._changing():
            if self._candidate is not None and self._current is not None:
                self._take_out(self._candidate)

    def end_calls(self) -> None:
        """Ends what is still being computed, where that can be done: nobody waits for it any more."""
        with self._changed:
            sessions = [version.session for version in self._versions if version.open and version.begun]
        for session in sessions:
            liveness_of(session).interrupt(0.0)

    def close(self) -> None:
        """Ends a load in progress and admits nobody any more. Sessions go with their last leases."""
        self._closed.set()
        self.unload()

    # ---- under the lock ----

    def _changing(self) -> _Changing:
        return _Changing(self._changed, self._after)

    def _after(self) -> None:
        if self._gone or self._lines or self._stuck:
            self._finish()

    def _finish(self) -> None:
        with self._changed:
            gone, self._gone = self._gone, []
            lines, self._lines = self._lines, []
            stuck, self._stuck = self._stuck, []
        for session, within in stuck:
            if liveness_of(session).interrupt(within):
                self._interrupted_at = self.clock()
        for line in lines:
            self._notify(f"{self.name}: {line}")
        if gone:
            dispose(gone)

    def _able(self, version: Version) -> Version:
        if not version.able:
            raise NotReadyError(f"{self.name}: the engine of version {version.name} died again and again: ask again in a minute")
        return version

    def _lend(self, version: Version) -> Lease:
        version.leases += 1
        return Lease(version, self._take_back)

    def _take_back(self, version: Version) -> None:
        with self._changing():
            version.leases -= 1
            self._close_unused(version)

    def _in_service(self) -> tuple[Version, ...]:
        return tuple(version for version in (self._current, self._candidate, self._previous) if version is not None)

    def _last(self, name: str) -> Version | None:
        return next((version for version in reversed(self._versions) if version.name == name), None)

    def _named(self, name: str) -> Version:
        for version in self._in_service():
            if version.name == name:
                return version
        if (last := self._last(name)) is not None:
            reason = f" ({last.reason})" if last.reason else ""
            raise NotReadyError(f"{self.name}: version {name} is {last.state}{reason}: ask for one that is ready")
        there = ", ".join(version.name for version in self._in_service()) or "none"
        raise UnknownVersionError(f"{self.name}: no version {ascii(name)[:60]}: there is {there}")

    def _entry(self, version: Version) -> IndexEntry:
        entry = IndexEntry(name=self.name, version=version.name, state=version.state, reason=self._part(version))
        if version.state != "ready" or version.able:
            return entry
        return replace(entry, state="unable", reason=f"{entry.reason}; its engine died again and again, and is left alone for a while")

    def _part(self, version: Version) -> str:
        """What a version has to do with requests now."""
        if version is self._candidate:
            return f"candidate: canary {self.rollout.canary:.0%}, shadow {self.rollout.shadow:.0%}"
        if version is self._previous:
            return "previous: kept warm"
        if version is self._current:
            return "current" if self._probation is None else "current, on probation"
        return version.reason

    def _tally(self, version: Version) -> Tally | None:
        if version is self._candidate:
            return self._trial
        return self._probation if version is self._current else None

    def _settle_by_time(self) -> None:
        """What time has ended, and nothing else: for those who come by and bring nothing to judge by."""
        now, seconds = self.clock(), self.rollout.for_seconds
        if now >= self._due:
            self._find_overdue(now)
        candidate, trial, current, probation = self._candidate, self._trial, self._current, self._probation
        tried = candidate and trial and (not candidate.able or self._lacks_engine or now - min(trial.since, self._asked) >= seconds)
        if tried or (current and probation and (not current.able or now - probation.since >= seconds)):
            self._settle()

    @property
    def _lacks_engine(self) -> bool:
        """Whether nobody is answered: the engines of the current version and of the previous one are gone."""
        return self._current is not None and self._current.dead and (self._previous is None or self._previous.dead)

    def _settle(self) -> None:
        """Judges the current version, then the candidate, if they are on trial, and does what follows."""
        if self._current is not None and self._probation is not None and self._previous is not None:
            verdict = self._judge(self._current, self._probation, self._previous)
            if verdict is not None:
                self._end_probation(self._current, self._previous, verdict)
        if self._candidate is not None and self._trial is not None and self._current is not None:
            if self._lacks_engine and self._candidate.able:
                verdict = Verdict(passed=True, reason=f"the engine of {self._current.name} died again and again")
            else:
                verdict = self._judge(self._candidate, self._trial, self._current, self._asked)
            if verdict is not None:
                self._end_trial(self._candidate, verdict)

    def _judge(self, version: Version, tally: Tally, base: Version, asked: float = inf) -> Verdict | None:
        """None also as long as a version that has passed is at what it began before: it may not come back. One whose engine cannot be
        asked for now has failed where its predecessor's can, whatever was counted: nothing more is while it is asked nothing. But not where
        that one's has died since, too: then it may be the images, and nobody is to send a version back with them. Nor does a version fail,
        whatever it did, beside one whose engine is gone: it stays when its time is over, unless that one is there again before."""
        now = self.clock()
        if not version.able:
            if base.dead or not base.able or base.liveness.deaths > tally.deaths:
                return None
            if death := version.new_death():
                self._lines.append(f"version {version.name}: {death}")
            return Verdict(passed=False, reason="its engine died again and again, or could not be begun again")
        if not tally.failed and _waits(version, tally):
            return None
        if base.dead:
            over = now - tally.since >= self.rollout.for_seconds
            return Verdict(passed=True, reason=f"the engine of {base.name} died again and again") if over else None
        verdict = judge(self.rollout, tally, version.latencies, base.latencies, now=now, asked=asked)
        if verdict is None or not verdict.passed:
            return verdict
        tally.enough = min(tally.enough, now)
        return None if _waits(version, tally) else verdict

    def _end(self, begun: Begun) -> None:
        if begun.ended:
            return
        begun.ended = True
        version = begun.version
        version.begun.discard(begun)
        version.overdue -= begun.overdue
        version.leases -= 1
        self._close_unused(version)

    def _find_overdue(self, now: float) -> None:
        """Counts what does not come back as failed."""
        self._due = inf
        for version in self._versions:
            for begun in version.begun:
                if begun.due > now:
                    self._due = min(self._due, begun.due)
                    continue
                # Again and again: a session counts a call's time from when its engine was asked, which is later.
                self._stuck.append((version.session, begun.due - begun.at))
                self._due = min(self._due, now + _AGAIN_S)
                if not begun.overdue:
                    begun.overdue = True
                    version.overdue += 1
                    self._lines.append(f"version {version.name} did not come back with {begun.rows} images in {now - begun.at:.3g} s")
                    if (tally := self._tally(version)) is not None:
                        tally.rows += begun.rows
                        tally.failed += begun.rows
                        tally.overdue += begun.rows
        self._settle()

    def _end_trial(self, candidate: Version, verdict: Verdict) -> None:
        self._candidate = self._trial = None
        if verdict.passed:
            self._flip(candidate, verdict.reason)
        else:
            self._fail(candidate, f"refused on trial: {verdict.reason}")
        self._changed.notify_all()

    def _end_probation(self, current: Version, previous: Version, verdict: Verdict) -> None:
        self._previous = self._probation = None
        if verdict.passed:
            self._lines.append(f"version {current.name} stays ({verdict.reason}), {previous.name} goes")
            self._drain(previous)
            return
        self._current = previous
        self._begin_trial_anew()
        self._lines.append(f"version {current.name} is rolled back to {previous.name}: {verdict.reason}")
        self._fail(current, f"rolled back: {verdict.reason}")

    def _begin_trial_anew(self) -> None:
        """Beside another version: what was compared with the one that went says nothing of this."""
        if self._trial is not None and self._current is not None:
            self._trial = Tally(since=self.clock(), deaths=self._current.liveness.deaths)

    def _flip(self, version: Version, how: str) -> None:
        """From now on `version` answers. What stays warm is the last version that has proved itself."""
        old, self._current = self._current, version
        if old is None:
            self._lines.append(f"version {version.name} serves")
            return
        self._lines.append(f"version {version.name} takes over from {old.name}" + (f" ({how})" if how else ""))
        if self._previous is not None and self._previous.dead and not old.dead:
            self._drain(self._previous)
            self._previous = None
        if self._previous is None:
            self._previous = old
        else:  # the old one is on probation itself: the one before it is the safe one
            self._drain(old)
        self._probation = Tally(since=self.clock(), deaths=self._previous.liveness.deaths)
        self._settle()

    def _take_out(self, version: Version) -> None:
        if version is self._candidate:
            self._candidate = self._trial = None
        elif version is self._previous:
            self._previous = self._probation = None
        else:
            self._current, self._previous, self._probation = self._previous, None, None
            if self._current is None and self._candidate is not None:
                self._current, self._candidate, self._trial = self._candidate, None, None
            self._begin_trial_anew()
            if self._current is not None:
                self._lines.append(f"version {version.name} is unloaded, {self._current.name} serves")
        self._drain(version)
        self._changed.notify_all()

    def _drain(self, version: Version) -> None:
        version.state = "draining"
        self._close_unused(version)

    def _fail(self, version: Version, reason: str) -> None:
        version.state, version.reason = "failed", plain(reason)
        self._close_unused(version)

    def _close_unused(self, version: Version) -> None:
        if version.leases or version.state not in ("draining", "failed"):
            return
        session = version.close()
        if session is not None:
            self._gone.append(session)
            if deaths := liveness_of(session).deaths:
                self._deaths[version.name] += deaths
        if version.state == "draining":
            version.state = "unloaded"

    # ---- loading ----

    def _begin(self, version: Version) -> dict[Call, int]:
        """Puts a version on the index; what the current one was asked lately."""
        with self._changing():
            self._require_open()
            past = [one for one in self._versions if one.state in ("failed", "unloaded") and not one.open]
            shown = [one for one in past if one.name != version.name][-HISTORY:]
            self._versions = [one for one in self._versions if one not in past or one in shown] + [version]
            return {} if self._current is None else self._current.latencies.examples

    def _open(self, version: Version, lately: Mapping[Call, int]) -> None:
        found = self._loader.probe(version.path, lately, self._closed.is_set)
        with self._changing():
            version.digest = found.digest
            # Before it is opened here, which might be in vain. What is current when it is open may be the previous one, of which
            # the current one kept the contract.
            self._require_contract(version, found.signature)
        self._admit(version, self._loader.open(version.path, lately, found, self._closed.is_set))

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise NotReadyError(f"{self.name}: it is closed and loads nothing any more")

    def _require_contract(self, version: Version, signature: Signature) -> None:
        if self._current is None:
            return
        difference = contract_difference(signature, self._current.signature, other_classes=self._other_classes)
        if difference:
            raise RefusedError(f"{self.name}: version {version.name} has another contract ({difference}): serve it under another name")

    def _admit(self, version: Version, opened: Opened) -> None:
        """On trial where the rollout says so, else at once to the place of the current one."""
        with self._changing():
            if self._closed.is_set():
                self._gone.append(opened.session)
                self._require_open()
            version.opened(opened)
            self._settle()
            if self._current is None or self._lacks_engine or not self.rollout.tried:
                self._flip(version, "")
            else:
                self._candidate, self._trial = version, Tally(since=self.clock(), deaths=self._current.liveness.deaths)
                beside = self._current.name
                self._settle_by_time()
                if self._candidate is version:
                    bounds = f"until {self.rollout.for_requests} images, {self.rollout.for_seconds:g} s at most"
                    self._lines.append(f"version {version.name} is on trial beside {beside}: {bounds}")

    def _await_verdict(self, version: Version) -> None:
        """Returns when a version on trial has taken over. Raises RefusedError where it may not, NotReadyError where it was unloaded."""
        while True:
            with self._changing():
                self._settle_by_time()
                if version is not self._candidate:
                    break
                self._changed.wait(_POLL_S)  # also for the clock: time may end a trial that nobody asks anything of
        if version.state == "failed":
            raise RefusedError(f"{self.name}: version {version.name} is {version.reason}")
        if version.state != "ready":
            raise NotReadyError(f"{self.name}: version {version.name} was unloaded while it was on trial")


def _waits(version: Version, tally: Tally) -> bool:
    """Whether a version is at something that it began before it had passed."""
    return any(begun.at <= tally.enough for begun in version.begun) if tally.enough < inf else False


def _said(error: BaseException) -> str:
    """What an image failed with, in a line."""
    return plain(f"{type(error).__name__}: {_first_line(error)}".removesuffix(": "))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
