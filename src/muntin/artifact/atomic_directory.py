"""Directories written whole or not at all: a temporary sibling, fsync, rename. And temporary directories that do not outlive a `kill -9`.

A lock beside a directory is held while it is written (`file_lock`): so what lies beside it without a holder was left by a killed process.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from muntin.artifact.atomic_files import sync_directory, write_synced
from muntin.artifact.file_lock import exclusive, lock, release
from muntin.errors import ArtifactError

REMAINS_AGE_S = 3600.0
"""Seconds after which an unfinished write counts as killed, on file systems without locks."""
_SCRATCH = "muntin-export-"
"""Begin of the names of temporary directories."""


def replace_directory(path: Path, contents: Mapping[str, bytes], *, marker: str, names: Iterable[str] = ()) -> None:
    """Makes `path` a directory of exactly these files. Two processes that write the same directory do it one after the other.

    An existing directory is replaced if it is empty, or contains `marker` and only names of `contents` and `names`. Otherwise, and on a
    full disk, raises ArtifactError, and nothing changes. Between the two renames of a replacement there is no directory for an instant;
    after a crash there the old one lies beside it, under a name that ends in ".old". Remains of killed writes are removed.
    """
    target = refuse_foreign(path, {*contents, *names}, marker=marker)
    token = secrets.token_hex(4)
    fresh, aside = target.with_name(f".{target.name}.{token}.partial"), target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(f".{target.name}.lock")) as locked:
            _remove_left(target, "partial", age=0.0 if locked else REMAINS_AGE_S)
            _write(fresh, target, aside, contents)
            _remove_left(target, "old", age=0.0)  # a new directory is in place of it
    except OSError as error:
        raise ArtifactError(
            f"{path}: the artefact cannot be written ({error.strerror or error}): make room or name another place; nothing was left behind"
        ) from error


def publish_directory(fresh: Path, path: Path, *, names: Iterable[str], marker: str) -> None:
    """Renames `fresh`, a complete directory beside `path`, to `path`. An existing one is replaced as by `replace_directory`."""
    target = refuse_foreign(path, names, marker=marker)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    with exclusive(target.with_name(f".{target.name}.lock")):
        _publish(fresh, target, aside)


def _write(fresh: Path, target: Path, aside: Path, contents: Mapping[str, bytes]) -> None:
    try:
        fresh.mkdir()
        for name, data in contents.items():
            write_synced(fresh / name, data)
        _publish(fresh, target, aside)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, target: Path, aside: Path) -> None:
    """Put a written directory into place."""
    for folder in (*(path for path in fresh.iterdir() if path.is_dir()), fresh):
        sync_directory(folder)
    _swap(fresh, target, aside)
    try:
        sync_directory(target.parent)
    except OSError as error:
        raise ArtifactError(
            f"{target}: it is in place, but the disk does not confirm it ({error.strerror or error}): check the disk, then write again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory, removed at the end. Removes first those of processes that were killed."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_SCRATCH}*[0-9a-f]"):
        with suppress(OSError):  # in use, or another user's
            beside = left.with_name(f"{left.name}.lock")
            descriptor = lock(beside, wait=False)
            if descriptor is not None:
                shutil.rmtree(left, ignore_errors=True)
                release(beside, descriptor)
    folder = root / f"{_SCRATCH}{secrets.token_hex(8)}"
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def refuse_foreign(path: Path, names: Iterable[str], *, marker: str) -> Path:
    """Returns the resolved path if `replace_directory` may write there. Raises ArtifactError otherwise."""
    target = path.resolve()  # a link to an artefact is kept
    if not target.name:
        raise ArtifactError(f"{path}: cannot be an artefact: name a directory of its own")
    above = next(parent for parent in target.parents if os.path.lexists(parent))  # missing parents are created
    if not above.is_dir():
        raise ArtifactError(f"{path}: {above} is a file: name a directory below a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"{path}: nothing may be written in {above}: change its permissions or name another place")
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise ArtifactError(f"{path}: it is a file: name a directory")
    if os.path.ismount(target):  # a mount point cannot be renamed
        raise ArtifactError(f"{path}: a file system is mounted there, which cannot be replaced: name a directory in it")
    present = names_in(target)
    foreign = sorted(present.difference(names))
    if foreign or (present and marker not in present):
        name = foreign[0] if foreign else min(present)
        raise ArtifactError(f"{path}: it is no artefact (it holds {name}) and is not replaced: name another directory or empty it")
    return target


def names_in(directory: Path) -> set[str]:
    """Names in a directory. Raises ArtifactError if it cannot be read."""
    try:
        return {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise ArtifactError(f"{directory}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _remove_left(target: Path, kind: str, *, age: float) -> None:
    """Removes the remains of killed writes of a target that are older than `age` seconds. `kind`: "partial" or "old"."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{kind}")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name) and (not age or time.time() - path.stat().st_mtime > age):
                shutil.rmtree(path, ignore_errors=True)


def _swap(fresh: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        aside.rename(target)
        raise
