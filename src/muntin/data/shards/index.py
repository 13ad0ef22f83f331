"""The index of a shard: where each entry of a tar file lies.

Only headers are read, and nothing is extracted: names identify entries and are never used as paths. The index is kept in the user's cache,
by the shard's path, size and time of change. Each entry's header is compared again when it is opened (`PackedFile`), so an index that does
not fit any more leads to an error or a new scan, never to other pixels.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from muntin.artifact.atomic_files import write_files
from muntin.errors import DataError
from muntin.images.opening import DAMAGE, reason
from muntin.images.packed import BLOCK, PackedFile, header_checksum
from muntin.runtime.engines.compile_cache import cache_folder
from muntin.text import plain

FORMAT = 1
MAX_ENTRIES = 1_000_000
"""Entries of one shard."""
_MAX_HEADER = 1 << 16
"""Bytes of an extended header; longer ones would only fill the memory."""
_MAX_NAME = 1024
_MAX_CLASS_TEXT = 256
"""Bytes of an entry `.cls`, which is kept in the index."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A regular file in a shard. `text`: the content of a `.cls`, None for others."""

    file: PackedFile
    text: str | None


def shard_entries(path: Path) -> list[ShardEntry]:
    """The regular files in a shard, in order. Raises DataError for a file that is no tar, compressed, damaged, or has too many entries."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error
    place, cache = plain(str(path.resolve())), cache_folder()
    key = {"format": FORMAT, "path": place, "size": state.st_size, "changed": state.st_mtime_ns}
    index = None if cache is None else cache / "shards" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    rows = _cached(path, index, key)
    if rows is None:
        rows = list(_scan(path))
        if index is not None:
            with suppress(OSError):  # a full disk, a read-only home: the next command scans again
                index.parent.mkdir(parents=True, exist_ok=True)
                write_files(index.parent, {index.name: json.dumps({"key": key, "rows": rows}).encode()})
    return [_entry(path, *row) for row in rows]


def _entry(path: Path, name: str, offset: int, size: int, header: int, text: str | None) -> ShardEntry:
    return ShardEntry(file=PackedFile(file=path, name=name, offset=offset, size=size, header=header), text=text)


def _cached(path: Path, index: Path | None, key: dict[str, Any]) -> list[list[Any]] | None:
    """The rows of a kept index; None where it is of another state of the shard, or damaged."""
    if index is None:
        return None
    try:
        content = json.loads(index.read_bytes())
        rows: list[list[Any]] = content["rows"]
        if content["key"] != key or not all(_plausible(row, key["size"]) for row in rows):
            return None
        with path.open("rb") as stream:
            for row in (*rows[:1], *rows[-1:]):
                stream.seek(row[1] - BLOCK)
                if header_checksum(stream.read(BLOCK)) != row[3]:
                    return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return rows


def _plausible(row: Any, length: int) -> bool:
    name, offset, size, header, text = row
    numbers = all(type(number) is int for number in (offset, size, header))
    return type(name) is str and numbers and BLOCK <= offset <= offset + size <= length and (text is None or type(text) is str)


class _Headers:
    """A stream for `tarfile` that refuses to read more than a header at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)


def _scan(path: Path) -> Iterator[list[Any]]:
    """Read all headers. Yields name, offset, size, checksum and text of each entry."""
    last, number = "", 0
    with path.open("rb") as stream:
        if stream.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise DataError(f"{path} is compressed, so its entries have no place to read them from: unpack it (gunzip) to a plain .tar")
        stream.seek(0)
        try:
            with tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    archive.members.clear()
                    last, number = member.name, number + 1
                    if number > MAX_ENTRIES:
                        raise DataError(f"{path} has more than {MAX_ENTRIES:,} entries: divide it into several shards")
                    if len(last) > _MAX_NAME:
                        raise DataError(f"{path}: the name of entry {number} has {len(last):,} characters, more than {_MAX_NAME:,}")
                    if not member.isreg() or member.issparse():
                        continue
                    following = stream.tell()
                    stream.seek(member.offset_data - BLOCK)
                    header = header_checksum(stream.read(BLOCK))
                    text = None
                    if last.endswith(".cls"):
                        text = stream.read(min(member.size, _MAX_CLASS_TEXT)).decode(errors="replace").strip()
                    stream.seek(following)
                    yield [last, member.offset_data, member.size, header, text]
                stream.seek(archive.offset)
                if stream.read(BLOCK) != bytes(BLOCK):  # `tarfile` ends at a header that is damaged or cut off as at the archive's end
                    raise tarfile.ReadError("no header, and no end")
        except (tarfile.TarError, *DAMAGE) as error:
            where = f"after its entry {plain(last)}" if last else "at its start"
            raise DataError(f"{path} is damaged or cut off {where} ({reason(error)}): copy it anew, or write it again") from error
