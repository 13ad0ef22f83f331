"""The cache of compiled models, from which the next process opens an artefact faster.

    CACHE/compiled/<engine>-<version>-<digest of artefact and CPU>/<digest of shape and options>.bin

A folder belongs to one artefact (by its digest), one version of one engine and one kind of CPU. Every file begins with the digest of its
remaining content, so a damaged file is never run. Beyond `LIMIT` the least recently used folders are removed, then the least recently used
files of the folder in use, which has one file for each shape.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from muntin.runtime.host.hardware import cpu_identity

LIMIT = 2 << 30
"""Bytes of compiled models."""
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """The user's cache, which may not exist: $MUNTIN_CACHE, else $XDG_CACHE_HOME/muntin, else ~/.cache/muntin; None without a home."""
    own, shared = os.environ.get("MUNTIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else (Path(shared) if shared else Path.home() / ".cache") / "muntin"
    except RuntimeError:  # pathlib's error without a home
        return None


_FOLDER = re.compile(r"[a-z]+-[A-Za-z0-9._-]+-[0-9a-f]{32}")
"""Names of this module's folders; a user's folder may hold others beside them."""


def compiled_folder(engine: str, version: str, digest: str) -> Path | None:
    """Creates and returns the folder for an engine's compiled models of the artefact with this digest; None where that is not possible.

    Only its owner can read and write it: its content is executed.
    """
    key = hashlib.sha256(f"{digest}\n{cpu_identity()}".encode()).hexdigest()[:32]
    cache = cache_folder()
    if cache is None:
        return None
    try:
        root = cache / "compiled"
        folder = root / f"{engine}-{''.join(c if c.isalnum() or c in '.-' else '_' for c in version)}-{key}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(root):
            return None
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(folder):
            return None
        os.utime(folder)
    except OSError:  # a full disk, a read-only home
        return None
    return folder


class CompiledModels:
    """Compiled models of one artefact in one engine, by a key that names shape and options. Without a folder nothing is kept."""

    def __init__(self, engine: str, version: str, digest: str) -> None:
        self._engine, self._version, self._digest = engine, version, digest

    def read(self, key: str) -> bytes | None:
        """Returns the content of a key; None where there is none, or where it is damaged."""
        file = self._file(key)
        if file is None:
            return None
        try:
            data = file.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            with suppress(OSError):
                os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))  # file systems may not record reads
            return data[_DIGEST:]
        with suppress(OSError):
            file.unlink()
        return None

    def write(self, key: str, data: bytes) -> None:
        """Writes the content of a key, whole or not at all."""
        file = self._file(key)
        if file is None:
            return
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(dir=file.parent)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(hashlib.sha256(data).digest())
                    stream.write(data)
                Path(name).replace(file)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            make_room(file.parent, keep=file)

    def _file(self, key: str) -> Path | None:
        folder = compiled_folder(self._engine, self._version, self._digest)
        return None if folder is None else folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def _is_own(folder: Path) -> bool:
    """Returns True if only this user can write there."""
    if folder.is_symlink():
        return False
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def make_room(used: Path, *, keep: Path | None = None) -> None:
    """Removes the least recently used content until the rest is within `LIMIT`: folders other than `used`, then, if `keep` is given, files
    of `used` other than `keep`. Content that cannot be removed stays."""
    with suppress(OSError):
        folders = [folder for folder in used.parent.iterdir() if folder == used or _FOLDER.fullmatch(folder.name)]  # others are the user's
        sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
        total = sum(sizes.values())
        for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
            if total <= LIMIT:
                return
            if folder != used:
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]
        for file in sorted(used.iterdir(), key=lambda file: file.stat().st_atime) if keep is not None else ():
            if total <= LIMIT:
                return
            if file != keep:
                size = file.stat().st_size
                file.unlink()
                total -= size
