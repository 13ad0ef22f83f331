"""Which versions are there, and which of them serves: what the repository API of both faces asks for.

A name in a request is compared with the model's, and a version with those that the repository lists: none becomes part of a path.
"""

from __future__ import annotations

from collections.abc import Mapping

from muntin.errors import MuntinError
from muntin.serving.description import IndexEntry
from muntin.serving.protocol import Parameter, ProtocolError, shown
from muntin.serving.repository import Repository
from muntin.serving.slot import Slot
from muntin.serving.version import NotReadyError, UnknownVersionError

_STATES = {"loading": "LOADING", "ready": "READY", "draining": "UNLOADING", "unloaded": "UNAVAILABLE", "failed": "UNAVAILABLE"}
VERSION = "version"
"""The parameter of a request to load or unload that names one."""


class Control:
    """Loads and unloads versions of the one model. `load` and `unload` block: call them on a thread of their own."""

    def __init__(self, slot: Slot, repository: Repository) -> None:
        self._slot, self._repository = slot, repository

    def index(self, *, ready: bool) -> list[IndexEntry]:
        """Every version that is listed or served; those that wait in the repository are "UNAVAILABLE". `ready`: only those that answer."""
        entries = {
            entry.version: IndexEntry(name=entry.name, version=entry.version, state=_STATES[entry.state], reason=entry.reason)
            for entry in self._slot.index()
        }
        if ready:
            return [entry for entry in entries.values() if entry.state == "READY"]
        for name in self._repository.scan():
            entries.setdefault(name, IndexEntry(name=self._slot.name, version=name, state="UNAVAILABLE", reason="not loaded"))
        return list(entries.values())

    def load(self, model: str, parameters: Mapping[str, Parameter]) -> str:
        """Loads the version that is named, or the newest there is; its name. Raises ProtocolError where it does not come to serve."""
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
