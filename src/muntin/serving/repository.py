"""Where versions come from: one artefact, or a directory whose sub-directories with whole-number names are versions.

    DIR/manifest.json ...                          one artefact: version 1, whatever lies there
    DIR/1/manifest.json ...  DIR/2/manifest.json   versions, the highest number is the newest

What a client names is looked up among the names that were listed, and never becomes part of a path. A watcher loads what is new. It opens
an artefact only once all its digests are right, so a directory that is still being copied is left alone, and one that was renamed into
place is taken at once; what is broken is told once, and tried again when anything in it has changed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from muntin.artifact import open_artifact
from muntin.artifact.store import MANIFEST
from muntin.errors import ArtifactError, MuntinError, RecipeError
from muntin.serving.slot import Slot
from muntin.serving.telling import told_safely
from muntin.serving.version import NotReadyError, TookTooLongError, UnknownVersionError, Version

SINGLE = "1"
"""The name of the version of a repository that is one artefact."""
PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
"""After which a version that took too long is tried again."""
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")  # a 64-bit integer holds it; without leading zeros, so that no two names are one number

Fingerprint = frozenset[tuple[str, int, int, int, int]]
"""Of each file its name, inode, size, and the times (ns) of the last change of its content and of its inode."""


class Repository:
    """The versions below a directory, as they are when it is asked.

    Raises ArtifactError where there is no such directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ArtifactError(f"{path}: no such directory: name an artefact, or a directory of numbered ones")

    def scan(self) -> dict[str, Path]:
        """The versions by name, the oldest first. They are listed, not opened. Raises ArtifactError where the directory cannot be read."""
        return self._look()[0]

    def ignored(self) -> dict[str, str]:
        """The sub-directories, and links to nothing by a version's name, that are no versions, and why.

        Names that begin with a dot are those of writers, and left out.
        """
        return self._look()[1]

    def find(self, name: str) -> Path:
        """Where the version of this name is. Raises UnknownVersionError where none is listed by it."""
        versions = self.scan()
        if name not in versions:
            there = ", ".join(list(versions)[-5:]) or "none"
            raise UnknownVersionError(f"{self.path}: no version {ascii(name)[:60]}: there is {there}")
        return versions[name]

    def _look(self) -> tuple[dict[str, Path], dict[str, str]]:
        try:
            if (self.path / MANIFEST).is_file():
                return {SINGLE: self.path}, {}
            root = self.path.resolve(strict=True)
            entries = [entry for entry in self.path.iterdir() if not entry.name.startswith(".") and (entry.is_dir() or _dangles(entry))]
            reasons = {entry: _no_version(entry, root) for entry in entries}
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise ArtifactError(f"{self.path}: it cannot be listed ({error}): check the path and its permissions") from error
        versions = sorted((entry for entry in entries if not reasons[entry]), key=lambda entry: int(entry.name))
        return {entry.name: entry for entry in versions}, {entry.name: reason for entry, reason in reasons.items() if reason}


def _no_version(entry: Path, root: Path) -> str:
    """Why a sub-directory is no version; empty where it is one."""
    if not _NUMBER.fullmatch(entry.name):
        return "its name is no whole number from 1: name versions 1, 2, 3, ..."
    if _dangles(entry):
        return "it is a link to nothing: link it to an artefact in this directory, or remove it"
    if not entry.resolve().is_relative_to(root):
        return "it is a link that leads out of the directory: copy the artefact into it"
    return ""


def _dangles(entry: Path) -> bool:
    """Whether it is a link by a version's name, and what it leads to is not there."""
    return bool(_NUMBER.fullmatch(entry.name)) and entry.is_symlink() and not entry.exists()


def fingerprint(path: Path) -> Fingerprint | None:
    """What tells one state of a directory from another, without reading its files. None where it, or something in it, goes meanwhile.

    Raises OSError where it cannot be read.
    """
    found = set()
    try:
        for entry in path.iterdir():
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, or into a circle: it stays what it is, and whoever opens it says so
                status = entry.lstat()
            found.add((entry.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return frozenset(found)


class Watcher:
    """Looks every `interval_s` seconds, above 0, and loads what is newer than what serves.

    What cannot be loaded is tried again when its files change; what was open once and was sent back or unloaded, only when their content
    does. What took too long, as on a busy machine, is tried again after a minute, and after twice as long each further time, an hour at
    most. A number below one that has served is not loaded; where it came after that, this is told.

    `notify` is told in a line what was not loaded and why; what it raises is reported, and does not end the watching. `wait`: waits for so
    many seconds, and says whether to stop instead. `clock`: seconds.
    """

    def __init__(
        self,
        repository: Repository,
        slot: Slot,
        *,
        notify: Callable[[str], None],
        interval_s: float = 2.0,
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not interval_s > 0:
            raise RecipeError(f"interval_s={interval_s!r}: give seconds above 0")
        self._repository = repository
        self._slot = slot
        self._notify = told_safely(notify)
        self._interval_s = interval_s
        self._stopped = Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._clock = clock
        self._thread: Thread | None = None
        self._tried: dict[str, Fingerprint] = {}  # by name: loaded, or told that it cannot be
        self._seen: dict[str, Version | None] = {}  # by name: what the slot had of it when it was tried here
        self._incomplete: dict[str, Fingerprint] = {}  # seen once and not right: perhaps it is being copied
        self._again: dict[str, tuple[float, float]] = {}  # what took too long: when it is tried again, and the pause that was
        self._told: dict[str, str] = {}
        self._listed: set[str] | None = None  # at the look before
        self._newest = 0  # the highest number that has served

    def start(self) -> None:
        """Looks at once and then every interval, on a thread of its own, until `stop`."""
        self._thread = Thread(target=self._run, name="muntin-watch", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends it after the load in progress, if there is one (`Slot.close` ends that); waits for it for at most so long."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self.step()
            if self._wait(self._interval_s):
                return

    def step(self) -> str | None:
        """One look: loads the newest version that can be, and returns its name; None where there is nothing new.

        Blocks as `Slot.load` does. What goes wrong is told, and does not end the watching.
        """
        self._slot.settle()
        try:
            versions, ignored = self._repository.scan(), self._repository.ignored()
        except ArtifactError as error:
            self._tell_once("", str(error))
            return None
        self._told = {name: line for name, line in self._told.items() if name in ignored or name in versions}
        for name, reason in ignored.items():
            self._tell_once(name, f"{self._repository.path / name}: {reason}")
        known: dict[str, Any]
        for known in (self._tried, self._seen, self._incomplete, self._again):
            for name in set(known) - set(versions):
                del known[name]
        late = set() if self._listed is None else versions.keys() - self._listed
        self._listed = set(versions)
        for name in late:
            self._told.pop(name, None)
            if _number(name) < self._newest and (self._slot.current is None or name != self._slot.current.name):
                self._tell_once(name, f"version {name} is not loaded: {self._newest} has served: give it a higher one, or load it by name")
        return next((name for name in reversed(versions) if not self._slot.closed and self._try(name, versions[name])), None)

    def _tell_once(self, name: str, line: str) -> None:
        if self._told.get(name) != line:
            self._told[name] = line
            self._notify(line)

    def _try(self, name: str, path: Path) -> bool:
        """Loads a version if it is newer than the current one and was not tried as it is; whether it serves now."""
        current = self._slot.current
        if current is not None:
            self._newest = max(self._newest, _number(current.name))
        if _number(name) < self._newest and (current is None or name != current.name):
            return False  # nobody wants back what was served before the newest: who does asks the slot for it
        try:
            now = fingerprint(path)
        except OSError as error:
            self._tell_once(name, f"version {name} is not loaded: it cannot be read ({error}): check its permissions")
            return False
        self._told.pop(name, None)
        if now is None or (self._tried.get(name) == now and self._clock() < self._again.get(name, (math.inf,))[0]):
            return False
        if self._tried.get(name) != now:
            self._again.pop(name, None)
        try:
            digest = open_artifact(path).digest
        except (ArtifactError, OSError) as error:  # OSError: it is being taken away
            if self._incomplete.get(name) != now:
                self._incomplete[name] = now
                return False
            self._tried[name] = now
            self._notify(f"version {name} is not loaded: {error}")
            return False
        if current is not None and (name, digest) == (current.name, current.digest):
            self._tried[name], self._seen[name] = now, current
            return False
        seen = self._seen.get(name)
        if seen is not None and seen.was_open and seen.digest == digest:
            self._tried[name] = now  # touched, linked or copied, and what was sent back or unloaded all the same
            return False
        return self._load(name, path, now, digest)

    def _load(self, name: str, path: Path, now: Fingerprint, digest: str) -> bool:
        seen = self._seen.get(name)

        def loaded(last: Version | None) -> bool:
            """Whether somebody else had the same loaded since it was tried here; what became of it is theirs to say."""
            return last is not None and last is not seen and last.digest == digest

        try:
            self._slot.load(path, name, unless=loaded)
        except NotReadyError:  # so it was, or the slot was closed, or the version unloaded on trial: whoever did that knows
            return False
        except MuntinError as error:
            self._notify(f"version {name} is not loaded: {error}{self._put_off(name, error)}")
            return False
        finally:
            self._tried[name], self._seen[name] = now, self._slot.last(name)
        self._again.pop(name, None)
        self._newest = max(self._newest, _number(name))
        return True

    def _put_off(self, name: str, error: MuntinError) -> str:
        """Whether it is tried again as it is, in words."""
        if not isinstance(error, TookTooLongError):
            self._again.pop(name, None)
            return ""
        pause = min(LONGEST_PAUSE_S, 2 * self._again[name][1]) if name in self._again else PAUSE_S
        self._again[name] = self._clock() + pause, pause
        return f"; it is tried again in {pause:.0f} s"


def _number(name: str) -> int:
    return int(name) if _NUMBER.fullmatch(name) else 0
