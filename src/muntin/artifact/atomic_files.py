"""Files written whole or not at all: a temporary sibling, fsync, rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_files(directory: Path, contents: Mapping[str, bytes | memoryview]) -> None:
    """Writes files by name into a directory: all are complete on the disk before the first one gets its name.

    Raises OSError. Then the former files are unchanged and nothing is left behind, unless one of several renames failed.
    """
    copies = {name: hidden_sibling(directory / name) for name in contents}
    for name in contents:  # the only reason for a rename to fail after the writes succeeded
        refuse_folder(directory / name)
    try:
        for name, data in contents.items():
            write_synced(copies[name], data)
        for name, copy in copies.items():
            copy.replace(directory / name)
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)
    sync_directory(directory)


def hidden_sibling(path: Path) -> Path:
    """A new name beside a file, so that a rename stays inside one file system. It is short: a file's name may have the maximum length."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def refuse_folder(path: Path) -> None:
    """Raises IsADirectoryError for a folder, which no file can replace."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def put_in_place(part: Path, path: Path) -> None:
    """Gives a finished file its name, after its content is on the disk. Raises OSError."""
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    sync_directory(path.parent)


def write_synced(file: Path, data: bytes | memoryview) -> None:
    """Creates a file whose content is on the disk when this returns. Its name is once the directory is synced."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable, where the file system supports it."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # a directory may be writable but not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync directories
            raise
    finally:
        os.close(descriptor)
