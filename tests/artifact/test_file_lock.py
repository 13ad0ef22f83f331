from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muntin.artifact import file_lock
from muntin.artifact.file_lock import FOLDER_LOCK, FolderInUseError, folder_in_use
from muntin.errors import MuntinError

KILLED = """
import os, signal, sys
from pathlib import Path
from muntin.artifact.file_lock import folder_in_use
with folder_in_use(Path(sys.argv[1]), "muntin fit"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_holder(folder: Path) -> int:
    """Let a process hold a folder and be killed. Returns its number."""
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)]) as process:
        assert process.wait() == -signal.SIGKILL
        return process.pid


def test_folder_in_use(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    with folder_in_use(run, "muntin fit") as notes:
        assert notes == ()
        with pytest.raises(FolderInUseError) as error, folder_in_use(run, "muntin fit"):
            pass
        holder = rf"muntin fit \(process {os.getpid()} on \S+ since 2\d{{3}}-[^)]+\)"
        message = rf"{re.escape(str(run))} is in use by {holder}: wait for its end, stop it, or give another --output"
        assert re.fullmatch(message, str(error.value))
        with folder_in_use(run, "muntin report", name=".report.lock"):  # other work
            (run / "result").touch()
    assert [path.name for path in run.iterdir()] == ["result"]


def test_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"), folder_in_use(tmp_path / "runs" / "mine", "muntin fit"):
        raise ValueError("nothing")
    assert not list(tmp_path.iterdir())


def test_folder_of_a_killed_process(tmp_path: Path) -> None:
    run, copied = tmp_path / "run", tmp_path / "copied"
    pid = kill_holder(run)
    shutil.copytree(run, copied)
    for folder in (run, copied):
        with folder_in_use(folder, "muntin fit") as (note,):
            assert f"{folder} was locked by muntin fit (process {pid} on " in note and "its lock was taken over" in note
        with folder_in_use(folder, "muntin fit") as notes:
            assert notes == ()


def test_folder_with_an_unreadable_lock(tmp_path: Path) -> None:
    (tmp_path / FOLDER_LOCK).write_text('{"work": [1')
    with folder_in_use(tmp_path, "muntin fit") as notes:
        assert notes == ()
        (tmp_path / FOLDER_LOCK).write_text("[]")
        with pytest.raises(FolderInUseError, match="is in use by another process"), folder_in_use(tmp_path, "muntin fit"):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    with folder_in_use(tmp_path / "run", "muntin fit") as (note,):
        assert note == f"the file system of {tmp_path / 'run'} has no locks: start no second process that writes there"
        assert not list((tmp_path / "run").iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MuntinError, match="cannot be written") as error, folder_in_use(tmp_path / "file" / "run", "muntin fit"):
        pass
    assert "\n" not in str(error.value)


def test_lock_of_a_removed_file(tmp_path: Path) -> None:
    """Two processes wait for one: the second must not lock the file that the first one has removed."""
    file = tmp_path / "lock"
    first = file_lock.lock(file, wait=False)
    assert first is not None
    script = "import sys\nfrom pathlib import Path\nfrom muntin.artifact.file_lock import exclusive\nfile = Path(sys.argv[1])\n"
    script += "with exclusive(file):\n    log = file.with_name('log')\n    size = log.stat().st_size if log.exists() else 0\n"
    script += "    log.open('a').write('x' * 9)\n    assert log.stat().st_size == size + 9 and file.exists()\n"
    waiting = [subprocess.Popen([sys.executable, "-c", script, str(file)]) for _ in range(4)]
    file_lock.release(file, first)
    assert [process.wait() for process in waiting] == [0] * 4
    assert (tmp_path / "log").stat().st_size == 36 and not file.exists()


def test_link_in_place_of_a_lock(tmp_path: Path) -> None:
    """Whoever owns a shared folder cannot choose a file that is emptied."""
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER_LOCK).symlink_to(target)
    with pytest.raises(MuntinError, match=r"\.lock is a link"), folder_in_use(tmp_path / "run", "muntin fit"):
        pass
    assert target.read_text() == "content"


def test_pipe_in_place_of_a_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FOLDER_LOCK)
    with pytest.raises(MuntinError, match="a pipe"), folder_in_use(tmp_path, "muntin fit"):
        pass
