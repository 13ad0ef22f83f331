"""A picture inside a larger file, such as a tar archive: read by its offset, never extracted."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from muntin.errors import DataError
from muntin.text import plain

BLOCK = 512
"""Bytes of a tar header, which lies directly before the content."""
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """An entry of a tar file: `size` bytes from `offset`. It is used like a path: `open`, `name`, `stem`, `suffix`, and a text for errors.

    `header`: the checksum in the entry's tar header. It is compared at each opening, so that a file that was replaced is not read by the
    offsets of the former one. `name` only names the entry: it is never used as a path.
    """

    file: Path
    name: str
    offset: int
    size: int
    header: int

    @property
    def stem(self) -> str:
        """The name up to the first dot after the last slash, as webdataset divides names."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return f".{self.name.rpartition('.')[2]}"

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A read-only stream of the content. Raises DataError if the entry is not there any more, or cut off."""
        assert mode == "rb"
        stream = self.file.open("rb", buffering=0)
        try:
            length = stream.seek(0, io.SEEK_END)
            stream.seek(self.offset - BLOCK)
            if header_checksum(stream.read(BLOCK)) != self.header:
                raise DataError(f"{self} is not where it was: the file was changed after it was indexed; run the command again")
            if length < self.offset + self.size:
                raise DataError(f"{self} is cut off: its file ends {self.offset + self.size - length:,} bytes before; copy the file anew")
        except BaseException:
            stream.close()
            raise
        return io.BufferedReader(_Part(stream, self.offset, self.size), _BUFFER_BYTES)

    def read(self) -> bytes:
        """The whole content."""
        with self.open() as stream:
            return stream.read()

    def __str__(self) -> str:
        return f"{self.file}/{plain(self.name)}"


def header_checksum(block: bytes) -> int | None:
    """The checksum field of a tar header; None where there is no number."""
    try:
        return int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return None


class _Part(io.RawIOBase):
    """Some bytes of a stream, which it closes with itself."""

    def __init__(self, stream: io.FileIO, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._position = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._position))
        self._stream.seek(self._offset + self._position)
        count = self._stream.readinto(memoryview(buffer)[:length]) if length else 0
        self._position += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
