"""Locks between processes. A lock belongs to an open file, and the system releases it when the process ends, even by `kill -9`.

So no lock outlives its process, and a process number that is in use again does not matter. `flock` covers the processes of one machine,
and on NFS those of all machines. A file system may refuse locks; the functions below return that.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from muntin.errors import MuntinError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER_LOCK = ".lock"
"""Name of the lock in the folder of a run or of a compression."""
_REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


class FolderInUseError(MuntinError):
    """Another process works in a folder."""


@contextmanager
def folder_in_use(folder: Path, work: str, *, name: str = FOLDER_LOCK) -> Iterator[tuple[str, ...]]:
    """Hold a folder for one process at a time, and yield notes on the lock. The folder is created, and removed again if it stays empty.

    `work`: the command, for the message of a process that is refused. The lock's file `name` exists while the folder is held, and
    afterwards if the process was killed; the next process takes it over and notes that. Raises `FolderInUseError` if another process
    holds the folder, `MuntinError` if it cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / name
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(file, wait=False)
        except BlockingIOError:
            holder = _holder(file) or "another process"
            raise FolderInUseError(f"{folder} is in use by {holder}: wait for its end, stop it, or give another --output") from None
        except OSError as error:
            raise MuntinError(f"{folder} cannot be written ({error.strerror}): check its permissions and the free space") from error
        if descriptor is None:
            yield (f"the file system of {folder} has no locks: start no second process that writes there",)
            return
        before = _holder(file)
        _name_holder(descriptor, work)
        yield () if before is None else (f"{folder} was locked by {before}, which does not hold it any more: its lock was taken over",)
    finally:
        if descriptor is not None:
            release(file, descriptor)
        for path in missing:
            with suppress(OSError):  # it holds results
                path.rmdir()


@contextmanager
def exclusive(file: Path) -> Iterator[bool]:
    """Wait for the lock of a file and hold it. Yields False where the file system has no locks."""
    descriptor = lock(file, wait=True)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            release(file, descriptor)


def lock(file: Path, *, wait: bool) -> int | None:
    """Lock a file, which is created if absent, and return its descriptor. None: the file system has no locks.

    Raises BlockingIOError if another process holds the lock and `wait` is False, OSError if the file cannot be opened.
    """
    if fcntl is None:
        return None
    while True:
        descriptor, held = _open(file), False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = _is_open(file, descriptor)  # otherwise its last holder has removed it: try again with a new one
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            file.unlink(missing_ok=True)
            return None
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor


def _open(file: Path) -> int:
    """Open or create a lock's file. Raises OSError for a pipe, and a link: in a shared folder another user would choose the file."""
    problem = OSError(errno.ELOOP, f"{file.name} is a link or a pipe, and a lock must be a file: remove it")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise problem from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise problem
    return descriptor


def release(file: Path, descriptor: int) -> None:
    """Remove the file of a lock, then unlock it."""
    with suppress(OSError):  # the folder is gone, or not writable any more
        if _is_open(file, descriptor):
            file.unlink()
    os.close(descriptor)


def _is_open(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name_holder(descriptor: int, work: str) -> None:
    """Write this process into the file of a lock that it holds. On a full disk the file stays empty, and the lock holds as well."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    content = json.dumps({"work": work, "process": os.getpid(), "host": socket.gethostname(), "since": since})
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content.encode(), 0)


def _holder(file: Path) -> str | None:
    """Return the process that a lock's file names, with its work, host and begin. None for an empty or unreadable file."""
    try:
        content = json.loads(file.read_bytes())
        return f"{content['work']} (process {int(content['process'])} on {content['host']} since {content['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None
