"""The routing table of a model: the current version, the candidate for its place, and the previous one, to which it can be rolled back.

                 trial                     probation
    candidate ----------> current  <------------------- previous
        |  refused           |  rolled back: previous becomes current
        v                    v
      failed               failed

Nothing here takes a lock: the slot holds its own around every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from muntin.artifact import AnySignature
from muntin.runtime.session import Session
from muntin.serving.protocol.metadata import IndexEntry
from muntin.serving.versions.rollout import Rollout, Tally, Verdict, judge_version
from muntin.serving.versions.version import Begun, RefusedError, UnknownVersionError, Version, contract_difference, covers, first_line
from muntin.serving.worker.calls import Call
from muntin.serving.worker.opening import NotReadyError
from muntin.text import plain

HISTORY = 8
"""Failed and unloaded versions that `index` still lists."""
OFTEN = 32
"""Batches of a size, remembered by a version, after which the operator is advised to have it compiled."""
_STATES = {"loading": "LOADING", "ready": "READY", "draining": "UNLOADING", "unloaded": "UNAVAILABLE", "failed": "UNAVAILABLE"}


class Routes:
    """The versions of the model `name`.

    For the caller to act on: `lines` for the operator, sessions without users (`closing`), and sessions with an overdue call (`stuck`),
    with the seconds after which it was overdue.
    """

    def __init__(self, name: str, rollout: Rollout) -> None:
        self.name, self.rollout = name, rollout
        self.versions: list[Version] = []
        self.current: Version | None = None
        self.candidate: Version | None = None
        self.previous: Version | None = None
        self.trial: Tally | None = None
        """Counts of the candidate, judged beside the current version."""
        self.probation: Tally | None = None
        """Counts of the current version, judged beside the previous one, while there is one."""
        self.lines: list[str] = []
        self.closing: list[Session] = []
        self.stuck: list[tuple[Session, float]] = []
        self._advised: set[Hashable] = set()

    # ---- looking up ----

    @property
    def in_service(self) -> tuple[Version, ...]:
        return tuple(version for version in (self.current, self.candidate, self.previous) if version is not None)

    def last(self, name: str) -> Version | None:
        """Return the version of this name that was loaded last, in any state."""
        return next((version for version in reversed(self.versions) if version.name == name), None)

    def named(self, name: str) -> Version:
        """Return the version of this name. Raises NotReadyError if it is not in service, UnknownVersionError if there is none."""
        for version in self.in_service:
            if version.name == name:
                return version
        if (last := self.last(name)) is not None:
            reason = f" ({last.reason})" if last.reason else ""
            raise NotReadyError(f"{self.name}: version {name} is {last.state}{reason}: ask for one that is ready")
        names = ", ".join(version.name for version in self.in_service) or "none"
        raise UnknownVersionError(f"{self.name}: no version {ascii(name)[:60]}: there is {names}")

    def choose(self, name: str | None, *, canary: bool) -> Version:
        """Return the version for a new request: the named one; else the candidate if the request is a `canary`; else the current one.

        Raises NotReadyError if it cannot answer, and the errors of `named`.
        """
        version = self.named(name) if name is not None else self.current
        if name is None and canary and self.candidate is not None and self.candidate.able:
            version = self.candidate
        if version is None:
            raise NotReadyError(f"{self.name}: no version is ready: load one, or ask again when it is open")
        if not version.able:
            raise NotReadyError(f"{self.name}: the engine of version {version.name} died again and again: ask again in a minute")
        return version

    def fallback(self, version: Version) -> Version | None:
        """Return the version that computes a batch which failed on this one, or None.

        The current version for a candidate or a version out of service, the previous one for the current one. None if it does not take the
        same calls.
        """
        other = None if version is self.previous else self.previous if version is self.current else self.current
        return other if other is not None and covers(other.signature, version.signature) else None

    def index(self) -> tuple[IndexEntry, ...]:
        """List one version per name, the newest last: the one in service, the current one first, otherwise the one loaded last."""
        shown = {version.name: version for version in (*self.versions, *reversed(self.in_service))}
        return tuple(self._entry(version) for version in shown.values())

    def _entry(self, version: Version) -> IndexEntry:
        state, reason = _STATES[version.state], version.reason
        if version is self.candidate:
            reason = f"candidate: canary {self.rollout.canary:.0%}, shadow {self.rollout.shadow:.0%}"
        elif version is self.previous:
            reason = "previous: kept warm"
        elif version is self.current:
            reason = "current" if self.probation is None else "current, on probation"
        if version.state == "ready" and not version.able:
            state, reason = "UNAVAILABLE", f"{reason}; its engine died again and again, and is left alone for a while"
        return IndexEntry(name=self.name, version=version.name, state=state, reason="; ".join(filter(None, (reason, version.lineage))))

    def deaths(self) -> dict[str, int]:
        """Count the deaths of engines by version name, of the versions that `index` lists."""
        deaths: Counter[str] = Counter()
        for version in self.versions:
            deaths[version.name] += version.deaths
        return dict(deaths)

    def holds(self, name: str, digest: str) -> bool:
        """Return whether the current version, or the last one of this name, is this artefact."""
        return any(one is not None and (one.name, one.digest) == (name, digest) for one in (self.current, self.last(name)))

    def require_contract(self, version: Version, signature: AnySignature) -> None:
        """Raise RefusedError if `signature` would mislead the clients of the current version."""
        if self.current is not None and (difference := contract_difference(signature, self.current.signature)):
            raise RefusedError(f"{self.name}: version {version.name} has another contract ({difference}): serve it under another name")

    # ---- counting ----

    def count(self, version: Version, rows: int, failure: BaseException | None, agreement: float | None = None) -> None:
        """Count a batch of a version that is on trial or on probation. `agreement`: share of labels that are the current version's."""
        if (tally := self._tally(version)) is not None:
            tally.batches += 1
            tally.rows += rows
            if failure is not None:
                tally.failed += rows
                tally.why = tally.why or plain(f"{type(failure).__name__}: {first_line(failure)}".removesuffix(": "))
            if agreement is not None and tally is self.trial:
                tally.compared += rows
                tally.agreed += agreement * rows

    def _tally(self, version: Version) -> Tally | None:
        if version is self.candidate:
            return self.trial
        return self.probation if version is self.current else None

    def advise(self, version: Version, call: Call) -> None:
        """Advise the operator, once, to have a size compiled of which a version remembers `OFTEN` batches."""
        size = call.size
        if version.compiled_sizes and size not in version.compiled_sizes | self._advised and version.latencies.count(call) == OFTEN:
            self._advised.add(size)
            what, option = call.advice
            self.lines.append(f"{what} come often, and version {version.name} is not compiled for them: {option}")

    # ---- changing ----

    def add(self, version: Version) -> None:
        """Add a version that is being loaded, and forget all but the last versions that are closed."""
        past = [one for one in self.versions if one.state in ("failed", "unloaded") and not one.open]
        kept = [one for one in past if one.name != version.name][-HISTORY:]
        self.versions = [one for one in self.versions if one not in past or one in kept] + [version]

    def admit(self, version: Version, now: float) -> None:
        """Put an open version on trial where the rollout says so; otherwise make it the current one."""
        self.settle(now)
        if self.current is None or not self.rollout.tried:
            self._flip(version, "", now)
            return
        self.candidate, self.trial = version, Tally(since=now)
        bounds = f"until {self.rollout.for_requests} rows, {self.rollout.for_seconds:g} s at most"
        self.lines.append(f"version {version.name} is on trial beside {_other(self.current, version)}: {bounds}")

    def settle(self, now: float) -> None:
        """Judge the current version, then the candidate, where they are on trial."""
        for version in self.versions:
            if death := version.new_death():
                self.lines.append(f"version {version.name}: {death}")
            for begun in version.begun:
                if begun.due <= now:
                    self._count_overdue(begun, now)
        if self.current is not None and self.probation is not None and self.previous is not None:
            verdict = judge_version(self.rollout, self.probation, self.current, self.previous, now=now)
            if verdict is not None:
                self._end_probation(self.current, self.previous, verdict, now)
        if self.candidate is not None and self.trial is not None and self.current is not None:
            verdict = judge_version(self.rollout, self.trial, self.candidate, self.current, now=now)
            if verdict is not None:
                self._end_trial(self.candidate, verdict, now)

    def _count_overdue(self, begun: Begun, now: float) -> None:
        self.stuck.append((begun.version.session, begun.due - begun.at))
        if begun.overdue:
            return
        begun.overdue = True
        self.lines.append(f"version {begun.version.name} did not come back with {begun.rows} rows in {now - begun.at:.3g} s")
        if (tally := self._tally(begun.version)) is not None:
            tally.rows += begun.rows
            tally.failed += begun.rows
            tally.overdue += begun.rows

    def take_out(self, version: Version, now: float) -> None:
        """Take a version out of service. The previous one replaces the current one, or else the candidate does."""
        if version is self.candidate:
            self.candidate = self.trial = None
        elif version is self.previous:
            self.previous = self.probation = None
        else:
            self.current, self.previous, self.probation = self.previous, None, None
            if self.current is None:
                self.current, self.candidate, self.trial = self.candidate, None, None
            self.trial = self.trial and Tally(since=now)  # comparisons with another version say nothing
            if self.current is not None:
                self.lines.append(f"version {version.name} is unloaded, {self.current.name} serves")
        self._drain(version)

    def fail(self, version: Version, reason: str) -> None:
        version.state, version.reason = "failed", plain(reason)
        self._close_unused(version)

    def give_back(self, version: Version) -> None:
        """Give back one lease, and close a version that was waiting for its last one."""
        version.leases -= 1
        self._close_unused(version)

    def _close_unused(self, version: Version) -> None:
        if version.leases or version.state not in ("draining", "failed"):
            return
        if (session := version.close()) is not None:
            self.closing.append(session)
        if version.state == "draining":
            version.state = "unloaded"

    def _flip(self, version: Version, reason: str, now: float) -> None:
        """Make a version the current one. The last version that passed its probation stays warm."""
        old, self.current = self.current, version
        if old is None:
            self.lines.append(f"version {version.name} serves")
            return
        self.lines.append(f"version {version.name} takes over from {_other(old, version)}" + (f" ({reason})" if reason else ""))
        if self.previous is None:
            self.previous = old
        else:
            self._drain(old)  # it was on probation itself: the one before it is safer
        self.probation = Tally(since=now)
        self.settle(now)

    def _end_trial(self, candidate: Version, verdict: Verdict, now: float) -> None:
        self.candidate = self.trial = None
        if verdict.passed:
            self._flip(candidate, verdict.reason, now)
        else:
            self.fail(candidate, f"refused on trial: {verdict.reason}")

    def _end_probation(self, current: Version, previous: Version, verdict: Verdict, now: float) -> None:
        self.previous = self.probation = None
        if verdict.passed:
            self.lines.append(f"version {current.name} stays ({verdict.reason}), {_other(previous, current)} goes")
            self._drain(previous)
            return
        self.current = previous
        self.trial = self.trial and Tally(since=now)
        self.lines.append(f"version {current.name} is rolled back to {_other(previous, current)}: {verdict.reason}")
        self.fail(current, f"rolled back: {verdict.reason}")

    def _drain(self, version: Version) -> None:
        version.state = "draining"
        self._close_unused(version)


def _other(other: Version, version: Version) -> str:
    """Return the name of another version for a line about `version`. A version that is loaded again has the same name."""
    if other.name != version.name:
        return other.name
    return f"its earlier load ({'same' if other.digest == version.digest else 'changed'} artefact)"
