from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muntin.data.shards import index
from muntin.data.shards.index import shard_entries
from muntin.errors import DataError


def write_tar(path: Path, contents: dict[str, bytes], **options: int) -> Path:
    with tarfile.open(path, "w", format=options.get("format", tarfile.PAX_FORMAT)) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


CONTENTS = {"a.jpg": b"one", "a.cls": b" 7\n", "folder/b.jpg": b"", "Müll" * 60 + ".png": b"x" * 1000}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_entries_of_a_tar(tmp_path: Path, cache: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", CONTENTS, format=form)
    first = shard_entries(path)
    assert {entry.file.name: entry.file.read() for entry in first} == CONTENTS
    assert [entry.text for entry in first] == [None, "7", None, None]
    assert [entry.file.stem for entry in first] == ["a", "a", "folder/b", "Müll" * 60]
    monkeypatch.setattr(index, "_scan", None)  # the second time the kept index is read
    assert shard_entries(path) == first


def test_kinds_of_entries_that_are_not_read(tmp_path: Path, cache: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo(f"{kind!r}.jpg")
            entry.type, entry.linkname = kind, str(outside)
            archive.addfile(entry)
        for name in ("../../up.jpg", "/etc/absolute.jpg"):  # only names: nothing is written or opened by them
            archive.addfile(tarfile.TarInfo(name))
    assert [entry.file.name for entry in shard_entries(tmp_path / "a.tar")] == ["../../up.jpg", "/etc/absolute.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache", "secret"]


def test_changed_shard(tmp_path: Path, cache: Path) -> None:
    """A file of equal length and time with other entries: the kept index is not used, and what was opened before is refused."""
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"one", "b.jpg": b"two"})
    state = path.stat()
    before = shard_entries(path)
    write_tar(path, {"a.jpg": b"one", "c.jpg": b"3"})
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    with pytest.raises(DataError, match=r"a.tar/b.jpg is not where it was: the file was changed"):
        before[1].file.read()
    assert [entry.file.name for entry in shard_entries(path)] == ["a.jpg", "c.jpg"]
    path.write_bytes(path.read_bytes()[:512])
    with pytest.raises(DataError, match=r"a.tar/a.jpg is cut off: its file ends 3 bytes before"):
        before[0].file.read()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"key": 1}', '{"key": KEY, "rows": [["a.jpg", -5, 3, 1, null]]}', '{"key": KEY, "rows": 3}']
)
def test_damaged_index(tmp_path: Path, cache: Path, content: str) -> None:
    path = write_tar(tmp_path / "a.tar", CONTENTS)
    first = shard_entries(path)
    (kept,) = cache.iterdir()
    kept.write_text(content.replace("KEY", json.dumps(json.loads(kept.read_text())["key"])))
    assert shard_entries(path) == first


def test_index_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path / "file"))
    assert len(shard_entries(write_tar(tmp_path / "a.tar", CONTENTS))) == 4


def test_refused_shards(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_tar(tmp_path / "good.tar", {f"{number}.jpg": b"x" * 600 for number in range(4)})
    for name, content, says in (
        ("cut.tar", good.read_bytes()[:2000], "cut.tar is damaged or cut off after its entry 0.jpg"),
        ("text.tar", b"no tar at all" * 100, "text.tar is damaged or cut off at its start"),
        ("empty.tar", b"", "empty.tar is damaged or cut off at its start"),
        ("packed.tar", b"\x1f\x8b" + bytes(600), "packed.tar is compressed"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            shard_entries(tmp_path / name)
    with tarfile.open(tmp_path / "header.tar", "w", pax_headers={"comment": "x" * 200_000}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="header of 200,"):
        shard_entries(tmp_path / "header.tar")
    monkeypatch.setattr(index, "MAX_ENTRIES", 3)
    with pytest.raises(DataError, match="more than 3 entries"):
        shard_entries(good)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes(tmp_path: Path, cache: Path, data: st.DataObject) -> None:
    """Damage leads to a DataError or to entries inside the file."""
    content = bytearray(write_tar(tmp_path / "a.tar", CONTENTS).read_bytes()[:5000])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "b.tar").write_bytes(content)
    try:
        for entry in shard_entries(tmp_path / "b.tar"):
            assert len(entry.file.read()) == entry.file.size
    except DataError as error:
        assert "\n" not in str(error)
