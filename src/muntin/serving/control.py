"""Which versions are there, and which of them serves: what the repository API of both faces asks for.

A name in a request is compared with the model's, and a version with those that the repository lists: none becomes part of a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress

from muntin.errors import ArtifactError, MuntinError
from muntin.serving.description import IndexEntry
from muntin.serving.protocol import Parameter, ProtocolError, RefusedRequestError, shown
from muntin.serving.repository import Repository
from muntin.serving.slot import Slot
from muntin.serving.threads import Threads
from muntin.serving.version import NotReadyError, UnknownVersionError

_STATES = {
    "loading": "LOADING",
    "ready": "READY",
    "unable": "UNAVAILABLE",
    "draining": "UNLOADING",
    "unloaded": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}
LOADS = 4
"""Requests to load that may wait until those before them have ended; beyond, they are refused."""
LISTINGS = 4
"""Listings of the repository that may go on or wait; beyond, they are refused: a directory on a network may stand still."""
END_S = 5.0
"""That a load has at the end."""
VERSION = "version"
"""The parameter of a request to load or unload that names one."""


class Control:
    """Loads and unloads versions of the one model. `load`, `unload` and `index` block: event loops ask with `loaded`, `unloaded` and
    `indexed`."""

    def __init__(self, slot: Slot, repository: Repository) -> None:
        self._slot, self._repository = slot, repository
        self._loads = Threads("muntin-load", most=1)
        self._loading = 0
        self._closed = False
        self._listings = Threads("muntin-listing", most=1)

    def close(self) -> None:
        """Waits for the thread that loads, but not for a directory that stands still. What it loads is the slot's to end before."""
        self._closed = True
        self._loads.join(END_S)

    async def loaded(self, model: str, parameters: Mapping[str, Parameter]) -> str:
        """As `load`, one after the other, on a thread that does nothing else: what waits there keeps nothing else waiting, least of all an
        unload. Raises RefusedRequestError where `LOADS` wait. Cancelled, it takes back a load that has not begun."""
        self._check(model)
        if self._loading > LOADS:
            raise RefusedRequestError(f"{LOADS} loads wait for the one that goes on: try again when it has ended")
        if self._closed:
            raise RefusedRequestError("the server is shutting down")
        try:
            loading = self._loads.submit(self.load, model, parameters)
        except RuntimeError as error:  # this process may have no more threads
            raise RefusedRequestError(f"it cannot be loaded now: {error}") from error
        self._loading += 1
        try:
            return await asyncio.wrap_future(loading)
        finally:
            self._loading -= 1
            del loading  # an error holds this frame by its traceback

    async def unloaded(self, model: str, parameters: Mapping[str, Parameter]) -> None:
        """As `unload`, on some thread."""
        await asyncio.to_thread(self.unload, model, parameters)

    async def indexed(self, *, ready: bool) -> list[IndexEntry]:
        """As `index`, on a thread that nothing else waits for: a directory on a network may take its time. Raises RefusedRequestError where
        `LISTINGS` wait for it."""
        if self._listings.pending >= LISTINGS:
            raise RefusedRequestError("the repository's directory is still being listed for others: try again")
        return await asyncio.wrap_future(self._listings.submit(self.index, ready=ready))

    def index(self, *, ready: bool) -> list[IndexEntry]:
        """Every version that is listed or served; those that wait in the repository are "UNAVAILABLE". `ready`: only those that answer.

        While the directory cannot be listed, those that the slot knows.
        """
        entries = {
            entry.version: IndexEntry(name=entry.name, version=entry.version, state=_STATES[entry.state], reason=entry.reason)
            for entry in self._slot.index()
        }
        if ready:
            return [entry for entry in entries.values() if entry.state == "READY"]
        waiting: Iterable[str] = ()
        with suppress(ArtifactError):
            waiting = self._repository.scan()
        for name in waiting:
            entries.setdefault(name, IndexEntry(name=self._slot.name, version=name, state="UNAVAILABLE", reason="not loaded"))
        return list(entries.values())

    def load(self, model: str, parameters: Mapping[str, Parameter]) -> str:
        """Loads the version that is named, or the newest there is; its name. Raises ProtocolError where it does not come to serve,
        RefusedRequestError where the slot ends its loads."""
        self._check(model)
        asked = self._version(parameters)
        try:
            versions = self._repository.scan()
            name = asked if asked is not None else next(reversed(versions), None)
            if name is None:
                raise ProtocolError(f"model {self._slot.name}: its repository holds no version: put one there", status=404)
            self._slot.load(self._repository.find(name), name)
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except MuntinError as error:
            if isinstance(error, ProtocolError):
                raise
            if self._slot.closed:
                raise RefusedRequestError(f"not loaded, the server is shutting down: {error}") from error
            raise ProtocolError(f"not loaded, what served goes on: {error}", status=409) from error
        return name

    def unload(self, model: str, parameters: Mapping[str, Parameter]) -> None:
        """Takes the version that is named out of service, or all. Who is being answered is still answered."""
        self._check(model)
        try:
            self._slot.unload(self._version(parameters))
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except NotReadyError as error:
            raise ProtocolError(str(error), status=409) from error

    def _check(self, model: str) -> None:
        if model != self._slot.name:
            raise ProtocolError(f"model {shown(model)}: this server has {self._slot.name}", status=404)

    def _version(self, parameters: Mapping[str, Parameter]) -> str | None:
        for name in parameters:
            if name not in (VERSION, "unload_dependents"):
                raise ProtocolError(f'parameter {shown(name)}: this server takes "{VERSION}", the name of a version')
        version = parameters.get(VERSION)
        if version is not None and not isinstance(version, str):
            raise ProtocolError(f'parameter "{VERSION}" is {shown(version)}: give a string')
        return version
