"""Directories written whole or not at all: a temporary sibling, fsync, rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from muntin.artifact.atomic_files import sync_directory, write_synced
from muntin.errors import ArtifactError

REMAINS_AGE_S = 3600.0
"""Seconds after which an unfinished write counts as killed."""


def replace_directory(path: Path, contents: Mapping[str, bytes], *, marker: str) -> None:
    """Makes `path` a directory of exactly these files.

    An existing directory is replaced if it is empty, or contains `marker` and only names of `contents`. Otherwise, and on a full disk,
    raises ArtifactError, and nothing changes. Between the two renames of a replacement there is no directory for an instant; after a crash
    there the old one lies beside it, under a name that ends in ".old". Remains of writes that were killed an hour ago are removed.
    """
    target = refuse_foreign(path, contents.keys(), marker=marker)
    token = secrets.token_hex(4)
    fresh, aside = target.with_name(f".{target.name}.{token}.partial"), target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        for name, data in contents.items():
            write_synced(fresh / name, data)
        sync_directory(fresh)
        _swap(fresh, target, aside)
    except OSError as error:
        raise ArtifactError(
            f"{path}: the artefact cannot be written ({error.strerror or error}): make room or name another place; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    try:
        sync_directory(target.parent)
    except OSError as error:
        raise ArtifactError(
            f"{path}: it is in place, but the disk does not confirm it ({error.strerror or error}): check the disk, then write again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _remove_left(target)


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


def _remove_left(target: Path) -> None:
    """Removes the remains of killed writes of this target. Younger ones than `REMAINS_AGE_S` may belong to a running write."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    with suppress(OSError):
        for path in target.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match and (match[1] == "old" or time.time() - path.stat().st_mtime > REMAINS_AGE_S):  # the target has replaced an old one
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
