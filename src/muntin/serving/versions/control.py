"""The repository API of both protocols: which versions there are, loading and unloading them.

The model name in a request is compared with this server's, and a version with those that the repository lists: none becomes part of a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from muntin.artifact.store import read_manifest
from muntin.errors import ArtifactError, MuntinError
from muntin.serving.protocol.messages import Parameter, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.metadata import IndexEntry
from muntin.serving.threads import Threads
from muntin.serving.versions.repository import Repository
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import RefusedError, UnknownVersionError
from muntin.serving.worker.opening import NotReadyError

LOADS, LISTINGS = 4, 4
"""Loads that may wait, and listings that may run or wait. Further ones are refused, since a directory on a network may not answer."""
END_S = 5.0
"""Seconds that a load may take during shutdown."""


class Control:
    """Loads, unloads and lists versions of the model. `load`, `unload`, `index` block; event loops use `loaded`, `unloaded`, `indexed`.

    `closed`: clients may not load and unload.
    """

    def __init__(self, slot: Slot, repository: Repository, *, closed: bool = False) -> None:
        self._slot, self._repository, self._closed = slot, repository, closed
        self._loads = Threads("muntin-load", most=1)
        self._listings = Threads("muntin-listing", most=1)

    def close(self) -> None:
        """Wait `END_S` for loads in progress, which `Slot.end_loads` has ended."""
        self._loads.join(END_S)

    async def loaded(self, model: str, parameters: Mapping[str, Parameter]) -> str:
        """Call `load` on a thread for loads only, one after the other. Raises RefusedRequestError if `LOADS` requests wait."""
        if self._loads.pending > LOADS:
            raise RefusedRequestError(f"{LOADS} loads wait for the one that goes on: try again when it has ended")
        return await asyncio.wrap_future(self._loads.submit(self.load, model, parameters))

    async def unloaded(self, model: str, parameters: Mapping[str, Parameter]) -> None:
        """Call `unload` on another thread."""
        await asyncio.to_thread(self.unload, model, parameters)

    async def indexed(self, *, ready: bool) -> list[IndexEntry]:
        """Call `index` on a thread for listings only. Raises RefusedRequestError where `LISTINGS` wait."""
        if self._listings.pending >= LISTINGS:
            raise RefusedRequestError("the repository's directory is still being listed for others: try again")
        return await asyncio.wrap_future(self._listings.submit(self.index, ready=ready))

    def index(self, *, ready: bool) -> list[IndexEntry]:
        """List the slot's versions, and those of the repository that are not loaded. `ready`: only those that answer."""
        entries = {entry.version: entry for entry in self._slot.index()}
        if ready:
            return [entry for entry in entries.values() if entry.state == "READY"]
        names: Iterable[str] = ()
        with suppress(ArtifactError):
            names = self._repository.scan()
        for name in names:
            entries.setdefault(name, IndexEntry(name=self._slot.name, version=name, state="UNAVAILABLE", reason="not loaded"))
        return list(entries.values())

    def load(self, model: str, parameters: Mapping[str, Parameter]) -> str:
        """Load the named version, or the newest one, and return its name. Raises ProtocolError, and RefusedRequestError during shutdown.

        With the parameter `digest` only this artefact is loaded, and not again if it serves: the client means one, and there may be others.
        """
        self._check(model)
        name, digest = self._version(parameters, "digest"), parameters.get("digest")
        if digest is not None and (name is None or not isinstance(digest, str)):
            raise ProtocolError('parameter "digest" is the sha256 of a named version\'s manifest: give "version" too, both as strings')
        try:
            if name is None and (name := next(reversed(self._repository.scan()), None)) is None:
                raise UnknownVersionError(f"model {self._slot.name}: its repository holds no version: put one there")
            path = self._repository.find(name)
            if isinstance(digest, str) and (found := read_manifest(path).sha256) != digest:
                raise RefusedError(f"version {name} of this server's repository is artefact {found[:12]}, not {digest[:12]!a}")
            self._load(path, name, digest if isinstance(digest, str) else "")
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except MuntinError as error:
            if self._slot.closed:
                raise RefusedRequestError(f"not loaded, the server is shutting down: {error}") from error
            raise ProtocolError(f"not loaded, what served goes on: {error}", status=409) from error
        return name

    def _load(self, path: Path, name: str, digest: str) -> None:
        try:
            self._slot.load(path, name, digest=digest)
        except NotReadyError:
            current = self._slot.current
            if not digest or current is None or (current.name, current.digest) != (name, digest):
                raise

    def unload(self, model: str, parameters: Mapping[str, Parameter]) -> None:
        """Take the version that is named out of service, or all versions. Admitted requests are still answered."""
        self._check(model)
        try:
            self._slot.unload(self._version(parameters))
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except NotReadyError as error:
            raise ProtocolError(str(error), status=409) from error

    def _check(self, model: str) -> None:
        if self._closed:
            raise ProtocolError(
                "load and unload are off: without tokens anyone who reaches this server could change what it serves; start it with "
                "--token-file, or with --open-control to allow that",
                status=403,
            )
        if model != self._slot.name:
            raise ProtocolError(f"model {shown(model)}: this server has {self._slot.name}", status=404)

    def _version(self, parameters: Mapping[str, Parameter], *others: str) -> str | None:
        for name in parameters:
            if name not in ("version", "unload_dependents", *others):
                raise ProtocolError(
                    f'parameter {shown(name)}: this server takes "version", the name of a version, and to load its "digest"'
                )
        version = parameters.get("version")
        if version is not None and not isinstance(version, str):
            raise ProtocolError(f'parameter "version" is {shown(version)}: give a string')
        return version
