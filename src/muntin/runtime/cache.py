"""Where engines keep what they compiled, so that the next process opens an artefact faster.

    CACHE/compiled/<engine>-<version>-<digest of artefact and CPU>/...

A folder belongs to one artefact (by its digest), one version of one engine and one kind of CPU: none of them is ever given what another
compiled. Folders that were not used for the longest time go when all of them together grow beyond `LIMIT`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from muntin.runtime.hardware import cpu_identity

LIMIT = 2 << 30
"""Bytes of compiled models that are kept."""


def cache_folder() -> Path:
    """The user's: $MUNTIN_CACHE, else $XDG_CACHE_HOME/muntin, else ~/.cache/muntin; it need not exist."""
    own, shared = os.environ.get("MUNTIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "muntin"


def compiled_folder(engine: str, version: str, digest: str) -> Path | None:
    """The folder, made if need be, for what `engine` compiles of the artefact with this digest; None where none can be written.

    It can be read by its owner alone: what lies in it is executed.
    """
    key = hashlib.sha256(f"{digest}\n{cpu_identity()}".encode()).hexdigest()[:32]
    root = cache_folder() / "compiled"
    folder = root / f"{engine}-{''.join(c if c.isalnum() or c in '.-' else '_' for c in version)}-{key}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in (root, folder):
            if place.is_symlink() or not _is_own(place):
                return None
        os.utime(folder)
        _prune(root, keep=folder)
    except OSError:
        return None  # a full disk or a read-only home slows the next opening down; it does not change what is computed
    return folder


def _is_own(folder: Path) -> bool:
    """Whether nobody but this user can have put something there."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _prune(root: Path, *, keep: Path) -> None:
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in root.iterdir()}
    total = sum(sizes.values())
    for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
        if total <= LIMIT:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]
