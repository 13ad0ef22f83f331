"""The loop: new labelled pictures in a folder -> an update when enough have come -> gate -> push.

    FOLDER/images, masks (or CLASS/)     where pictures arrive; only read
    RUN/inbox/1/...                      the pictures of one update: copies of those that were new, fixed while it lasts
                start.json, done.json    its parent, set once; what became of it
                dropped.json             its pictures that cannot be used, and why
    RUN/updates/1, RUN/versions/2        as of `muntin update`

A picture counts once its mask is there and both files have been unchanged for `SETTLED_S`. Links are left out: whoever may put pictures
into the folder could else have any file of this machine copied. State is what lies in the run's folder, so a process may be killed at any
moment: the next one goes on with the inbox that is not done; with other settings, in another folder of updates. So it does after any error
that is not of these pictures. Pictures of a refused update are not tried again; new ones begin a new update. Those that cannot be used are,
once their files change.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from muntin.artifact.answers import ANSWERS, Task
from muntin.errors import DataError
from muntin.images.listing import composed, image_folder_pair, paired_folders, paired_splits, pictures, pictures_below, subfolders
from muntin.images.writing import write_whole
from muntin.tasks.classes import ClassSpec
from muntin.training.checkpoint import find_checkpoint, read_checkpoint
from muntin.training.progress.report import FitReport
from muntin.updating.new_pictures import NewPicturesError, digest_of
from muntin.updating.update import VERSIONS, UpdateResult, newest_accepted, offer_update, refuse_restore, root_of, run_directory, update_run
from muntin.updating.versions import ServerClient

INBOX, START, DROPPED, DONE = "inbox", "start.json", "dropped.json", "done.json"
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
    """One round: the update, or why its pictures could not be used; the version's folder and the server's words, if it was offered.

    `dropped`: the pictures that were left out, with reasons.
    """

    number: int
    result: UpdateResult | None
    problem: str = ""
    version: Path | None = None
    server: str = ""
    dropped: tuple[str, ...] = ()


class _Dropped(BaseModel):
    """A picture that cannot be used. `files`: size and time of the image in the watched folder, and of its mask, when it was dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    files: tuple[tuple[int, int] | None, ...]


_DROPPED = TypeAdapter(dict[str, _Dropped])


class FolderWatch:
    """Watches `folder` for a run. One process at a time watches a run (`folder_in_use` of the inbox)."""

    def __init__(self, run: Path, folder: Path, settings: WatchSettings, client: ServerClient | None) -> None:
        self.run, self.folder, self.settings, self.client = root_of(run_directory(run)), folder, settings, client
        self.inbox = self.run / INBOX
        recipe = read_checkpoint(run).recipe
        refuse_restore(recipe)
        self.task: Task = recipe.task
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder: name the one in which labelled pictures arrive")
        if ANSWERS[self.task].masks and (train := paired_splits(folder)) and train["train"][0].parent != folder:
            raise DataError(f"{folder} holds splits, and a watch makes its own: name {train['train'][0].parent}, or another with images/")

    def step(self, *, now: float | None = None, report: FitReport = lambda progress: None) -> WatchedUpdate | None:
        """Look once: go on with an unfinished round, or begin one if enough pictures are new. None: there is nothing to do.

        Blocks as `update_run` does. Raises `PushError` if the server does not answer, and other kinds of `MuntinError` for what is not the
        fault of the new pictures, such as a full disk; the round is then not done.
        """
        number = self._unfinished() or self._collect(time.time() if now is None else now)
        return None if number is None else self._update(number, report)

    def waiting(self, *, now: float | None = None) -> int:
        """Number of new pictures that are complete."""
        return len(self._new(time.time() if now is None else now))

    def links(self) -> int:
        """Number of labelled pictures that are left out because they, their masks or their folders are links."""
        return sum(self._linked(files) for files in _labelled(self.folder, self.task).values())

    def _linked(self, files: Sequence[Path]) -> bool:
        """Return True if a file, or a folder below the watched one that holds it, is a link."""
        inside = (place for file in files for place in (file, *file.parents) if self.folder in place.parents)
        return any(place.is_symlink() for place in inside)

    def _rounds(self) -> list[Path]:
        numbers = [int(path.name) for path in self.inbox.iterdir() if path.name.isdecimal()] if self.inbox.is_dir() else []
        return [self.inbox / str(number) for number in sorted(numbers)]

    def _unfinished(self) -> int | None:
        return next((int(path.name) for path in self._rounds() if not (path / DONE).is_file()), None)

    def _collect(self, now: float) -> int | None:
        """Copy the new pictures into the next inbox, if there are enough. Returns its number."""
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
                try:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _copy(file, place)  # no hard link: a picture that is edited in place would change while it is learned
                except FileNotFoundError:  # it was removed: look again
                    return None
                except OSError as error:
                    reason = error.strerror or error
                    raise DataError(f"cannot copy {file} to {place}: {reason}: check its permissions, and make room") from error
        part.rename(target)
        return number

    def _parent(self, place: Path) -> Path:
        """The checkpoint that a round goes on from, the same after a kill."""
        file = place / START
        if not file.is_file():
            parent = find_checkpoint(newest_accepted(self.run))
            write_whole(file, json.dumps({"parent": os.path.relpath(parent, self.run)}, indent=1).encode() + b"\n")
        try:
            return self.run / str(json.loads(file.read_bytes())["parent"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged ({error}): remove {place}, and its pictures are taken again") from error

    def _new(self, now: float) -> dict[str, tuple[Path, ...]]:
        """New complete pictures by name: image and mask, or the image in its class's folder."""
        own, rounds = (START, DROPPED, DONE), self._rounds()
        taken = {str(path.relative_to(one)) for one in rounds for path in one.rglob("*") if path.is_file() and path.name not in own}
        dropped = {name: entry.files for one in rounds for name, entry in _read_dropped(one).items()}
        new = {}
        for name, files in _labelled(self.folder, self.task).items():
            image = str(files[0].relative_to(self.folder))
            unchanged = image in dropped and dropped[image] == tuple(_stamp(file) for file in files)
            if image not in taken and not unchanged and all(_settled(file, now) for file in files) and not self._linked(files):
                new[name] = files
        return dict(sorted(new.items()))

    def _update(self, number: int, report: FitReport) -> WatchedUpdate:
        place, settings = self.inbox / str(number), self.settings
        parent = self._parent(place)
        try:
            result = self._learned(place, parent, report)
        except NewPicturesError as error:  # of all pictures together
            return self._give_up(number, str(error))
        dropped = tuple(entry.reason for entry in _read_dropped(place).values())
        if result.verdict is None:
            return WatchedUpdate(number=number, result=result, problem="interrupted", dropped=dropped)
        version, server = None, ""
        if result.accepted:
            version, record = offer_update(result, settings.repository or self.run / VERSIONS, self.client)
            server = "" if record is None else record.reason
        self._finish(place, {"update": result.directory.name, "verdict": result.verdict.summary, "server": server})
        return WatchedUpdate(number=number, result=result, version=version, server=server, dropped=dropped)

    def _learned(self, place: Path, parent: Path, report: FitReport) -> UpdateResult:
        """The update of a round with the pictures that can be used. Raises `NewPicturesError` if they are too few."""
        settings = self.settings
        while _labelled(place, self.task):
            try:
                return update_run(
                    parent, place, added=self._added(parent), overrides=settings.overrides, threads=settings.threads, report=report
                )
            except NewPicturesError as error:
                if not error.files:
                    raise
                self._drop(place, error.files)
        raise NewPicturesError(f"{place}: no picture is left that can be used")

    def _drop(self, place: Path, reasons: Mapping[Path, str]) -> None:
        """Remove pictures from a round. Raises `DataError` if their files cannot be read, which says nothing about the pictures."""
        pictures = {files[0]: files for files in _labelled(place, self.task).values()}
        dropped = dict(_read_dropped(place))
        for image, reason in reasons.items():
            stamps = []
            for copy in pictures.get(image, (image,)):
                file, digest = self.folder / copy.relative_to(place), digest_of(copy)
                stamps.append(_stamp(file) if file.is_file() and digest_of(file) == digest else None)  # None: it was changed since
            dropped[str(image.relative_to(place))] = _Dropped(reason=reason, files=tuple(stamps))
        write_whole(place / DROPPED, _DROPPED.dump_json(dropped, indent=1) + b"\n")
        for image in reasons:
            image.unlink()

    def _give_up(self, number: int, problem: str) -> WatchedUpdate:
        """End a round without an update. If pictures were dropped, the others are new again, and wait for more."""
        place = self.inbox / str(number)
        dropped = tuple(entry.reason for entry in _read_dropped(place).values())
        if dropped:
            for image, *_ in _labelled(place, self.task).values():
                image.unlink()
        self._finish(place, {"problem": problem})
        return WatchedUpdate(number=number, result=None, problem=problem, dropped=dropped)

    def _added(self, parent: Path) -> Sequence[ClassSpec]:
        """The classes to add that the parent lacks."""
        known = {entry.name for entry in read_checkpoint(parent).state.classes}
        return [entry for entry in self.settings.added if entry.name not in known]

    def _finish(self, place: Path, content: dict[str, str]) -> None:
        write_whole(place / DONE, json.dumps(content, indent=1).encode() + b"\n")


def _labelled(folder: Path, task: Task) -> dict[str, tuple[Path, ...]]:
    """The labelled pictures of a folder by name."""
    if ANSWERS[task].one:
        folders = subfolders(folder)
        return {path.relative_to(folder).as_posix(): (path,) for place in folders for path in pictures_below(place)}
    pair = image_folder_pair(folder)
    if pair is None:
        return {}
    found: dict[str, tuple[Path, ...]] = {}
    for place, inside, inside_masks in paired_folders(*pair):
        by_stem = {composed(path.stem): path for path in pictures(inside_masks)}
        for path in pictures(inside):
            if (mask := by_stem.get(composed(path.stem))) is not None:
                found[f"{place}/{path.name}"] = (path, mask)
    return found


def _copy(file: Path, place: Path) -> None:
    """Copy a file. Raises OSError for one that has become a link."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | no_link)) as source, place.open("wb") as target:
        shutil.copyfileobj(source, target)


def _settled(file: Path, now: float) -> bool:
    try:
        return now - file.stat().st_mtime >= SETTLED_S
    except OSError:  # it was removed
        return False


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of the last change, which tell whether a file was changed; None if it is gone."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read_dropped(place: Path) -> dict[str, _Dropped]:
    """The dropped pictures of a round by the path of their images."""
    file = place / DROPPED
    try:
        return _DROPPED.validate_json(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValidationError) as error:
        problem = " ".join(str(error).split())[:120]
        raise DataError(f"{file}: damaged ({problem}): remove it, and its pictures are taken again") from error


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
