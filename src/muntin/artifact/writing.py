"""Files that are there whole or not at all: a temporary sibling, fsync, rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_files(directory: Path, contents: Mapping[str, bytes | memoryview]) -> None:
    """Writes files by name into a directory: all are complete on the disk before any takes its name.

    Raises OSError, and leaves what was there before and nothing else, unless it is the last rename of several that the system refuses.
    """
    # Hidden siblings, so that taking the final name is a rename inside one file system; removed whatever happens.
    # Not named after it: a name may be as long as names can be.
    copies = {name: (directory / name).with_name(f".{secrets.token_hex(8)}.tmp") for name in contents}
    for name in contents:  # the one reason that a rename may have and writing beside it not
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))
    try:
        for name, data in contents.items():
            write_synced(copies[name], data)
        for name, copy in copies.items():
            copy.replace(directory / name)
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)
    sync_directory(directory)


def write_synced(file: Path, data: bytes | memoryview) -> None:
    """Makes a new file that is on the disk when this returns; its name is once the directory is synced, too."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Makes renames in it durable, where the file system can."""
    if os.name != "posix":  # elsewhere a directory cannot be opened, and the rename is all there is
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # one may write in it and not look into it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that sync no directories, as some over a network
            raise
    finally:
        os.close(descriptor)
