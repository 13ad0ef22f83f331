"""The loop: new labelled pictures in a folder -> an update when enough have come -> gate -> push.

    FOLDER/images, masks (or CLASS/)     where pictures arrive; only read
    RUN/inbox/1/...                      the pictures of one update: links to those that were new, fixed while it lasts
                start.json, done.json    its parent and folder, set once; what became of it
    RUN/updates/1, RUN/versions/2        as of `muntin update`

A picture counts once its mask is there and both files have been unchanged for `SETTLED_S`. State is what lies in the run's folder, so a
process may be killed at any moment: the next one goes on with the inbox that is not done.
Pictures of a refused update are not tried again; new ones begin a new update.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from muntin.data.classes import ClassSpec
from muntin.data.listing import composed, paired_folders, pictures, pictures_below, subfolders
from muntin.data.source import DataTask
from muntin.errors import DataError
from muntin.images.writing import write_whole
from muntin.training.checkpoint import find_checkpoint, read_checkpoint
from muntin.training.progress.report import FitReport
from muntin.updating.run import FOLDER as UPDATES
from muntin.updating.run import (
    VERSIONS,
    UpdateResult,
    newest_accepted,
    offer_update,
    refuse_restore,
    root_of,
    run_directory,
    update_folders,
    update_run,
)
from muntin.updating.versions import ServerClient

INBOX, START, DONE = "inbox", "start.json", "done.json"
SETTLED_S = 2.0
"""Seconds that a file must have been unchanged, so that none is read while it is written."""


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """`every`: new pictures that begin an update. `repository`: for accepted versions, with or without a server; None: RUN/versions."""

    every: int
    added: tuple[ClassSpec, ...] = ()
    overrides: tuple[str, ...] = ()
    repository: Path | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class WatchedUpdate:
    """One round: the update, or why its pictures could not be used; the version's folder and the server's words, if it was offered."""

    number: int
    result: UpdateResult | None
    problem: str = ""
    version: Path | None = None
    server: str = ""


class FolderWatch:
    """Watches `folder` for a run. One process at a time watches a run (`folder_in_use` of the inbox)."""

    def __init__(self, run: Path, folder: Path, settings: WatchSettings, client: ServerClient | None) -> None:
        self.run, self.folder, self.settings, self.client = root_of(run_directory(run)), folder, settings, client
        self.inbox = self.run / INBOX
        recipe = read_checkpoint(run).recipe
        refuse_restore(recipe)
        self.task: DataTask = recipe.task
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder: name the one in which labelled pictures arrive")

    def step(self, *, now: float | None = None, report: FitReport = lambda progress: None) -> WatchedUpdate | None:
        """Look once: go on with an unfinished round, or begin one if enough pictures are new. None: there is nothing to do.

        Blocks as `update_run` does. Raises `PushError` if the server does not answer; the round is then not done.
        """
        number = self._unfinished() or self._collect(time.time() if now is None else now)
        return None if number is None else self._update(number, report)

    def waiting(self, *, now: float | None = None) -> int:
        """Number of new pictures that are complete."""
        return len(self._new(time.time() if now is None else now))

    def _rounds(self) -> list[Path]:
        numbers = [int(path.name) for path in self.inbox.iterdir() if path.name.isdecimal()] if self.inbox.is_dir() else []
        return [self.inbox / str(number) for number in sorted(numbers)]

    def _unfinished(self) -> int | None:
        return next((int(path.name) for path in self._rounds() if not (path / DONE).is_file()), None)

    def _collect(self, now: float) -> int | None:
        """Link the new pictures into the next inbox, if there are enough. Returns its number."""
        new = self._new(now)
        if len(new) < self.settings.every:
            return None
        rounds = self._rounds()
        number = int(rounds[-1].name) + 1 if rounds else 1
        part, target = self.inbox / f".{number}.partial", self.inbox / str(number)
        shutil.rmtree(part, ignore_errors=True)  # of a killed process
        for files in new.values():
            for file in files:
                place = part / file.relative_to(self.folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(file, place)
        part.rename(target)
        return number

    def _start(self, place: Path) -> tuple[Path, Path]:
        """The checkpoint that a round goes on from, and the folder of its update; the same after a kill."""
        file = place / START
        if not file.is_file():
            parent, folders = find_checkpoint(newest_accepted(self.run)), update_folders(self.run)
            number = int(folders[-1].name) + 1 if folders else 1
            content = {"parent": os.path.relpath(parent, self.run), "update": f"{UPDATES}/{number}"}
            write_whole(file, json.dumps(content, indent=1).encode() + b"\n")
        try:
            content = json.loads(file.read_bytes())
            return self.run / content["parent"], self.run / content["update"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged ({error}): remove {place}, and its pictures are taken again") from error

    def _new(self, now: float) -> dict[str, tuple[Path, ...]]:
        """New complete pictures by name: image and mask, or the image in its class's folder."""
        own = (START, DONE)
        taken = {str(path.relative_to(one)) for one in self._rounds() for path in one.rglob("*") if path.is_file() and path.name not in own}
        pictures = {
            name: files
            for name, files in _labelled(self.folder, self.task).items()
            if str(files[0].relative_to(self.folder)) not in taken and all(_settled(file, now) for file in files)
        }
        return dict(sorted(pictures.items()))

    def _update(self, number: int, report: FitReport) -> WatchedUpdate:
        place, settings = self.inbox / str(number), self.settings
        parent, directory = self._start(place)
        try:
            result = update_run(
                parent, place, directory=directory, added=self._added(parent), overrides=settings.overrides, threads=settings.threads,
                report=report,
            )  # fmt: skip
        except DataError as error:  # these pictures can never be used; others may
            self._finish(place, {"problem": str(error)})
            return WatchedUpdate(number=number, result=None, problem=str(error))
        if result.verdict is None:
            return WatchedUpdate(number=number, result=result, problem="interrupted")
        version, server = None, ""
        if result.accepted:
            version, record = offer_update(result, settings.repository or self.run / VERSIONS, self.client)
            server = "" if record is None else record.reason
        self._finish(place, {"update": result.directory.name, "verdict": result.verdict.summary, "server": server})
        return WatchedUpdate(number=number, result=result, version=version, server=server)

    def _added(self, parent: Path) -> Sequence[ClassSpec]:
        """The classes to add that the parent lacks."""
        known = {entry.name for entry in read_checkpoint(parent).state.classes}
        return [entry for entry in self.settings.added if entry.name not in known]

    def _finish(self, place: Path, content: dict[str, str]) -> None:
        write_whole(place / DONE, json.dumps(content, indent=1).encode() + b"\n")


def _labelled(folder: Path, task: DataTask) -> dict[str, tuple[Path, ...]]:
    """The labelled pictures of a folder by name."""
    if task == "classify":
        folders = subfolders(folder)
        return {path.relative_to(folder).as_posix(): (path,) for place in folders for path in pictures_below(place)}
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        return {}
    found: dict[str, tuple[Path, ...]] = {}
    for place, inside, inside_masks in paired_folders(images, masks):
        by_stem = {composed(path.stem): path for path in pictures(inside_masks)}
        for path in pictures(inside):
            if (mask := by_stem.get(composed(path.stem))) is not None:
                found[f"{place}/{path.name}"] = (path, mask)
    return found


def _settled(file: Path, now: float) -> bool:
    try:
        return now - file.stat().st_mtime >= SETTLED_S
    except OSError:  # it was removed
        return False


def _link(file: Path, place: Path) -> None:
    """A hard link, or a copy on another file system."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copy2(file, place)


def keep_watching(
    watch: FolderWatch,
    *,
    tell: Callable[[WatchedUpdate], None],
    report: FitReport = lambda progress: None,
    rounds: int | None = None,
    pause_s: float = 2.0,
) -> None:
    """Look every `pause_s` seconds until `rounds` updates are done (None: for ever) or one was interrupted; `tell` gets each round."""
    done = 0
    while rounds is None or done < rounds:
        update = watch.step(report=report)
        if update is None:
            time.sleep(pause_s)
            continue
        tell(update)
        if update.problem == "interrupted":
            return
        done += 1
