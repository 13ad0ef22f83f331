"""A slot: the versions of one model behind one lock, and how a new version takes over while requests go on.

    load:  open in another process -> same contract? -> canary, shadow -> flip -> the old one stays warm -> it drains, it is closed
                                                             |                        |
                                                          refused                 rolled back

The flip changes one reference under the lock. Requests hold leases: those admitted before it are answered by the old version, later ones by
the new one, and no session is closed while a lease on it is held. While the old version stays warm, it computes the batches that fail on
the new one or wait for it while it hangs (`fallback`). `routes` holds the versions, `rollout` the rules of a trial.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import inf
from pathlib import Path
from threading import Event, Lock, Thread

from muntin.errors import DataError, MuntinError, VerificationError
from muntin.runtime.session import Session
from muntin.serving.protocol.metadata import IndexEntry
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.routes import Routes
from muntin.serving.versions.version import Begun, RefusedError, Version, first_line
from muntin.serving.worker.calls import Call
from muntin.serving.worker.liveness import liveness_of
from muntin.serving.worker.opening import NotReadyError

_POLL_S = 0.05


def _close(sessions: list[Session]) -> None:
    for session in sessions:
        session.close()


class Lease(AbstractContextManager["Lease"]):
    """The right to use a version until it is given back. A context manager; giving it back is idempotent."""

    def __init__(self, version: Version, release: Callable[[Version], None]) -> None:
        self.version = version
        self._release: Callable[[Version], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release(self.version)

    def __exit__(self, *error: object) -> None:
        self.release()


class Slot:
    """The versions of one model. Threads may share it.

    `clock`: seconds. `random`: a number from 0 up to 1, by which requests are drawn for a candidate. `notify`: called with a line when a
    version takes over or is sent back, on any thread; it must not raise, nor call the slot.
    """

    def __init__(
        self,
        name: str,
        loader: ArtifactLoader,
        *,
        rollout: Rollout,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self.rollout, self.clock = name, rollout, clock
        self._loader, self._random, self._notify = loader, random, notify
        self._one_load = Lock()
        self._closed = Event()
        self._interrupted_at = -inf
        self._lock = Lock()  # guards the following, and all that the versions hold
        self._routes = Routes(name, rollout)

    # ---- requests ----

    def lease(self, version: str | None = None, *, canary: bool = True) -> Lease:
        """Lease the version for a new request: the named one, the current one, or for a canary's share of requests the candidate.

        `canary`: False for a request that computes nothing. Raises UnknownVersionError if there is none of this name, NotReadyError if it
        cannot answer.
        """
        with self._locked():
            self._settle()
            return self._lend(self._routes.choose(version, canary=canary and self._random() < self.rollout.canary))

    @property
    def shadowed(self) -> bool:
        """True if a candidate computes answered requests again."""
        return self._routes.candidate is not None and self.rollout.shadow > 0

    def shadow(self, answered: Version | None) -> Lease | None:
        """Lease the candidate to compute a batch of `answered` again, for its share of batches. None unless that is the current version."""
        with self._locked():
            candidate = self._routes.candidate
            if candidate is None or answered is not self._routes.current or self._random() >= self.rollout.shadow:
                return None
            return self._lend(candidate)

    def fallback(self, version: Version) -> Lease | None:
        """Lease a version that can compute a batch which failed on this one; None if there is none. Repeated calls come to an end."""
        with self._locked():
            other = self._routes.fallback(version)
            return None if other is None else self._lend(other)

    def hangs(self, version: Version) -> bool:
        """Return whether one of its batches is overdue."""
        with self._locked():
            self._settle()
            return any(begun.overdue for begun in version.begun)

    def interrupt(self, since: float) -> bool:
        """Interrupt overdue calls where their sessions can. Return whether any was interrupted since the time `since`."""
        self.settle()
        return self._interrupted_at >= since

    def begin(self, version: Version, *, rows: int, within: float = inf) -> Begun:
        """Begin a batch, which keeps its version open until `end` or `observe`. After `within` seconds it is overdue."""
        now = self.clock()
        begun = Begun(version, rows, now, now + within)
        with self._locked():
            version.leases += 1
            version.begun.add(begun)
        return begun

    def end(self, begun: Begun) -> None:
        """End a batch. Idempotent."""
        with self._locked():
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
        beside: Version | None = None,
        agreement: float | None = None,
    ) -> None:
        """Count a batch of `rows` that took `seconds`, or failed with `error`, and judge its version if it is on trial.

        `call`: its times are compared with the predecessor's, unless memory was too short to compute it as a `whole`. A DataError is no
        failure of the version. `begun`: the batch to end. `beside`: of a shadow, the version that answered the batch; `agreement`: the
        share of their answers on which both agree.
        """
        with self._locked():
            if begun is not None:
                self._end(begun)
                if begun.overdue:  # counted when it became overdue
                    self._settle()
                    return
            if call is not None and error is None and whole:
                version.latencies.add(call, seconds)
                self._routes.advise(version, call)
            elif call is not None and error is None:
                version.latencies.forget(call)
            failure = None if isinstance(error, DataError) else error
            self._routes.count(version, rows, failure, agreement if beside is self._routes.current else None)
            self._settle()

    # ---- state ----

    @property
    def ready(self) -> bool:
        """True if a request can be admitted."""
        current = self._routes.current
        return current is not None and current.able

    @property
    def current(self) -> Version | None:
        """The version that answers. To compute with it, take a lease."""
        return self._routes.current

    @property
    def open(self) -> tuple[Version, ...]:
        """The versions in service: the current one, a candidate, the previous one."""
        return self._routes.in_service

    def deaths(self) -> dict[str, int]:
        """Count the deaths of engines by version name, of the versions that `index` lists."""
        with self._locked():
            return self._routes.deaths()

    def index(self) -> tuple[IndexEntry, ...]:
        """List the versions, the newest last: one per name, the last that failed or were unloaded among them."""
        with self._locked():
            self._settle()
            return self._routes.index()

    def settle(self) -> None:
        """Judge versions whose time is over. Requests do so as well; to be called now and then while there are none."""
        with self._locked():
            self._settle()

    # ---- loading and unloading ----

    def load(self, path: str | Path, name: str, *, digest: str = "") -> Version:
        """Load a version and return when it is the current one. Blocks; a second call waits for the first.

        On any failure raises a MuntinError, and the current version stays. After the new one took over it may still be rolled back.
        `digest`: of the artefact that is meant; empty: whatever is there. With one, raises NotReadyError if the current or the last version
        of this name has it, and VerificationError if another artefact has taken its place.
        """
        with self._one_load:
            version = Version(name=name, path=Path(path))
            with self._locked():
                self._require_open()
                if digest and self._routes.holds(name, digest):
                    raise NotReadyError(f"{self.name}: version {name} was loaded before")
                beside = self._routes.current is not None
                self._routes.add(version)
            try:
                self._open(version, digest, beside=beside)
            except Exception as error:
                with self._locked():
                    if version.state == "loading":
                        self._routes.fail(version, str(error) or type(error).__name__)
                if isinstance(error, MuntinError):
                    raise
                raise VerificationError(f"{path}: it cannot be opened here ({type(error).__name__}: {first_line(error)})") from error
            return version

    def unload(self, name: str | None = None) -> None:
        """Take every version of a name out of service; None: all of them. Requests with a lease are still answered.

        The previous version, or else the candidate, replaces the current one. Raises UnknownVersionError if there is none of this name,
        NotReadyError if it is not in service.
        """
        with self._locked():
            if name is not None:
                self._routes.named(name)
            # The versions that would replace the current one go before it.
            for version in (self._routes.candidate, self._routes.previous, self._routes.current):
                if version is not None and name in (None, version.name):
                    self._routes.take_out(version, self.clock())

    @property
    def closed(self) -> bool:
        """True if it loads no more versions."""
        return self._closed.is_set()

    def end_loads(self) -> None:
        """End a load or trial in progress and admit no more. The current version stays."""
        self._closed.set()
        with self._locked():
            if self._routes.candidate is not None and self._routes.current is not None:
                self._routes.take_out(self._routes.candidate, self.clock())

    def end_calls(self) -> None:
        """Interrupt all batches in progress, where the sessions can."""
        with self._lock:
            sessions = [version.session for version in self._routes.versions if version.begun]
        for session in sessions:
            liveness_of(session).interrupt(0.0)

    def close(self) -> None:
        """End a load in progress and unload all versions. Sessions are closed with their last leases."""
        self._closed.set()
        self.unload()

    # ---- inside ----

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock. Afterwards report lines, interrupt overdue calls and close unused sessions, which may block."""
        try:
            with self._lock:
                yield
        finally:
            if self._routes.lines or self._routes.closing or self._routes.stuck:
                self._finish()

    def _finish(self) -> None:
        routes = self._routes
        with self._lock:
            lines, routes.lines = routes.lines, []
            closing, routes.closing = routes.closing, []
            stuck, routes.stuck = routes.stuck, []
        for session, within in stuck:
            if liveness_of(session).interrupt(within):
                self._interrupted_at = self.clock()
        for line in lines:
            self._notify(f"{self.name}: {line}")
        if closing:  # on another thread: it takes up to 0.2 s, and an event loop may give back the last lease
            try:
                Thread(target=_close, args=(closing,), name="muntin-unload").start()
            except RuntimeError:  # no new thread may start
                _close(closing)

    def _settle(self) -> None:
        self._routes.settle(self.clock())

    def _lend(self, version: Version) -> Lease:
        version.leases += 1
        return Lease(version, self._take_back)

    def _take_back(self, version: Version) -> None:
        with self._locked():
            self._routes.give_back(version)

    def _end(self, begun: Begun) -> None:
        if begun in begun.version.begun:
            begun.version.begun.remove(begun)
            self._routes.give_back(begun.version)

    def _computes(self) -> bool:
        return any(version.begun for version in self._routes.in_service)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise NotReadyError(f"{self.name}: it is closed and loads nothing any more")

    def _open(self, version: Version, digest: str, *, beside: bool) -> None:
        """Open a version, and wait until it has taken over. Raises RefusedError if it may not, NotReadyError if it was unloaded."""
        opened = self._loader.open(
            version.path,
            digest=digest,
            busy=self._computes if beside else None,
            stopped=self._closed.is_set,
            progress=version.progressed,
        )
        with self._locked():
            try:
                self._require_open()
                self._routes.require_contract(version, opened.signature)
            except MuntinError:
                self._routes.closing.append(opened.session)
                raise
            version.opened(opened)
            self._routes.admit(version, self.clock())

        self.settle()
        while version is self._routes.candidate:
            time.sleep(_POLL_S)
            self.settle()
        if version.state == "failed":
            raise RefusedError(f"{self.name}: version {version.name} is {version.reason}")
        if version.state != "ready":
            raise NotReadyError(f"{self.name}: version {version.name} was unloaded while it was on trial")
