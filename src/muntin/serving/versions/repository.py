"""The source of versions: one artefact, or a directory whose sub-directories with whole-number names are versions.

    DIR/manifest.json ...                          one artefact: version 1
    DIR/1/manifest.json ...  DIR/2/manifest.json   versions; the highest number is the newest

A client's version name is compared with the listed names and never becomes part of a path. A watcher opens an artefact only when all its
digests are right, so that a directory that is still being copied is left alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from threading import Event, Thread

from muntin.artifact import open_artifact
from muntin.artifact.store import MANIFEST
from muntin.errors import ArtifactError, MuntinError
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import UnknownVersionError
from muntin.serving.worker.opening import NotReadyError, TookTooLongError

SINGLE = "1"
"""The version name of a repository that is one artefact."""
PAUSE_S = 600.0
"""Seconds until a version that took too long is tried again."""
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")  # fits 64 bits; no leading zeros, so that no two names are one number

Fingerprint = frozenset[tuple[str, int, int, int, int]]
"""The state of a directory: of each file its name, inode, size, and the times (ns) of its last change of content and of inode."""


class Repository:
    """The versions below a directory, listed at each call. Raises ArtifactError where there is no such directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ArtifactError(f"{path}: no such directory: name an artefact, or a directory of numbered ones")

    def scan(self) -> dict[str, Path]:
        """List the versions by name, the oldest first, without opening them. Raises ArtifactError where the directory cannot be read."""
        return self.listing()[0]

    def find(self, name: str) -> Path:
        """The path of a version. Raises UnknownVersionError where no such name is listed."""
        versions = self.scan()
        if name not in versions:
            names = ", ".join(list(versions)[-5:]) or "none"
            raise UnknownVersionError(f"{self.path}: no version {ascii(name)[:60]}: there is {names}")
        return versions[name]

    def listing(self) -> tuple[dict[str, Path], dict[str, str]]:
        """List the versions as `scan` does, and the sub-directories that are no versions, with the reason.

        Names that begin with a dot are left out.
        """
        versions: dict[str, Path] = {}
        ignored: dict[str, str] = {}
        try:
            if (self.path / MANIFEST).is_file():
                return {SINGLE: self.path}, {}
            root = self.path.resolve(strict=True)
            for entry in self.path.iterdir():
                if entry.name.startswith(".") or not entry.is_dir():
                    continue
                if not _NUMBER.fullmatch(entry.name):
                    ignored[entry.name] = "its name is no whole number from 1: name versions 1, 2, 3, ..."
                elif not entry.resolve().is_relative_to(root):
                    ignored[entry.name] = "it is a link that leads out of the directory: copy the artefact into it"
                else:
                    versions[entry.name] = entry
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise ArtifactError(f"{self.path}: it cannot be listed ({error}): check the path and its permissions") from error
        return dict(sorted(versions.items(), key=lambda item: int(item[0]))), ignored


def fingerprint(path: Path) -> Fingerprint:
    """Compute the fingerprint of a directory without reading its files. Raises OSError if it, or one of its files, cannot be read."""
    files = ((entry.name, entry.stat()) for entry in path.iterdir())
    return frozenset((name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in files)


@dataclass(kw_only=True)
class _Attempt:
    """The last attempt to load a version: the state of its files then, and when it is tried again although they have not changed."""

    files: Fingerprint
    retry_at: float = inf


class Watcher:
    """Looks every `interval_s` seconds, above 0, and loads the newest version. Numbers below one that has served are not loaded.

    A version that cannot be loaded is tried again when its files change; one that was open, and was rolled back or unloaded, only when its
    content changes. One that took too long is tried again after `PAUSE_S`.

    `notify`: called with a line for each version that was not loaded, and the reason; it must not raise. `clock`: seconds.
    """

    def __init__(
        self,
        repository: Repository,
        slot: Slot,
        *,
        notify: Callable[[str], None],
        interval_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository, self._slot, self._notify = repository, slot, notify
        self._interval_s, self._clock = interval_s, clock
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="muntin-watch", daemon=True)
        self._attempts: dict[str, _Attempt] = {}
        self._reported: dict[str, str] = {}
        self._newest = 0  # the highest number that has served

    def start(self) -> None:
        """Begin to look, on a thread of its own, until `stop`."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Stop after the load in progress, which `Slot.close` ends, and wait up to `timeout_s` for it."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        self.step()
        while not self._stopped.wait(self._interval_s):
            self.step()

    def step(self) -> str | None:
        """Look once: load the newest version that can be loaded, and return its name; None where there is nothing new.

        Blocks as `Slot.load` does. Problems are reported to `notify`.
        """
        self._slot.settle()
        try:
            versions, ignored = self._repository.listing()
        except ArtifactError as error:
            self._report_once("", str(error))
            return None
        self._reported = {name: line for name, line in self._reported.items() if name in ignored or name in versions}
        self._attempts = {name: attempt for name, attempt in self._attempts.items() if name in versions}
        for name, reason in ignored.items():
            self._report_once(name, f"{self._repository.path / name}: {reason}")
        serving = "0" if self._slot.current is None else self._slot.current.name
        self._newest = max(self._newest, int(serving))
        for name in reversed(versions):
            if (int(name) >= self._newest or name == serving) and not self._slot.closed and self._try(name, versions[name]):
                self._newest = max(self._newest, int(name))
                return name
        return None

    def _report_once(self, name: str, line: str) -> None:
        if self._reported.get(name) != line:
            self._reported[name] = line
            self._notify(line)

    def _try(self, name: str, path: Path) -> bool:
        """Load a version unless it was tried before and has not changed. Return whether it serves now."""
        try:
            files = fingerprint(path)
        except OSError as error:
            self._report_once(name, f"version {name} is not loaded: it cannot be read ({error}): check its files and permissions")
            return False
        last = self._attempts.get(name)
        if last is not None and last.files != files:
            last = None
        if last is not None and self._clock() < last.retry_at:
            return False
        attempt = self._attempts[name] = _Attempt(files=files)
        try:
            digest = open_artifact(path).digest
        except (ArtifactError, OSError) as error:  # OSError: it is being removed
            if last is None:
                attempt.retry_at = -inf  # it may be being copied: report it only if it is the same at the next look
            else:
                self._notify(f"version {name} is not loaded: {error}")
            return False
        try:
            self._slot.load(path, name, digest=digest)
        except NotReadyError:  # it was loaded before, the slot was closed, or it was unloaded on trial: reported elsewhere
            return False
        except MuntinError as error:
            if isinstance(error, TookTooLongError):
                attempt.retry_at = self._clock() + PAUSE_S
            self._notify(f"version {name} is not loaded: {error}")
            return False
        return True
