"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from muntin.artifact.atomic_files import write_files


def test_write_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    write_files(tmp_path, {"a": b"one", "b": memoryview(b"two")})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"one", "b": b"two"}


def test_failing_write(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(OSError, match="No such file"):
        write_files(tmp_path, {"a": b"one", "missing/b": b"two"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"before")]


def test_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_files(tmp_path, {"a": b"one", "b": b"two"})
    assert (tmp_path / "a").read_bytes() == b"before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    assert error.value.filename == str(tmp_path / "b")


@pytest.mark.skipif(os.name != "posix", reason="a directory cannot be opened elsewhere")
@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_system_without_directory_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool) -> None:
    sync = os.fsync

    def refusing(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    if fails:
        with pytest.raises(OSError, match="Input/output"):
            write_files(tmp_path, {"a": b"one"})
    else:
        write_files(tmp_path, {"a": b"one"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"one")]


def test_longest_file_name(tmp_path: Path) -> None:
    name = "n" * 251 + ".png"
    write_files(tmp_path, {name: b"content"})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"content")]
