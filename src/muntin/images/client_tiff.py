"""Limits on a TIFF that a client sent, read from its directories before Pillow and libtiff see the file.

A few bytes of a directory can refer to the same data many times, or announce tiles of any size. Here each byte of the file counts as often
as a directory refers to it. Only those compressions and colours are allowed that libtiff decodes in time proportional to the pixels.
"""

from __future__ import annotations

import struct

from PIL import TiffTags

from muntin.errors import DataError
from muntin.images.opening import SENT, USE_TENSOR, damaged, silence_libtiff

MAX_ENTRIES = 256
"""Tags of all directories together; each directory counts as one more."""
MAX_VALUES = 1 << 18
"""Numbers in tags, of all directories together: Pillow makes a Python object of each."""
MAX_SAMPLES = 4
"""Channels."""
MAX_PIECES = 1 << 16
"""Strips or tiles of a picture."""
_COMPRESSIONS = (1, 5, 8, 32773, 32946)
"""None, LZW, deflate, PackBits, deflate by its old number. JPEG in TIFF can have many scans in each strip."""
_COLOURS = (0, 1, 2, 3)
"""Photometric interpretations: grey (white or black is 0), RGB, palette. libtiff converts others by code of its own."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Type of a tag's values -> bytes of one."""
_BYTES = (1, 2, 7)
"""Types whose values Pillow keeps as bytes or text."""
_WHOLE = {1: "B", 3: "H", 4: "I"}
"""Types of unsigned whole numbers, and their codes in `struct`."""
_LONG = (4, 13)
_SUBDIRECTORIES = (34665, 34853, 40965)
"""Tags that refer to a directory which Pillow reads: EXIF, position, interoperability."""
_WIDTH, _HEIGHT, _COMPRESSION, _COLOUR, _SAMPLES, _ROWS, _PLANES = 256, 257, 259, 262, 277, 278, 284
_STRIPS, _TILES = (273, 279), (324, 325)
"""Tags of the offsets and of the lengths of strips and tiles."""
_TILE_SIDES = (322, 323)

_Entry = tuple[int, int, int]
"""Type, number of values, position of the first one."""


def check_tiff(content: bytes, max_pixels: int) -> None:
    """Raises DataError for a TIFF whose decoding could cost more than its pixels, or that is damaged."""
    if content[2:4] not in (b"*\0", b"\0*"):
        raise DataError(f"{SENT} is a BigTIFF, which is for files of more than 4 GiB: store it as a classic TIFF")
    try:
        _Tiff(content).check(max_pixels)
    except struct.error as error:
        raise damaged(SENT, error) from error


class _Tiff:
    """Directories of a classic TIFF."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._order = "<" if content.startswith(b"II") else ">"
        self._page: dict[int, _Entry] = {}
        """Entries of the first page, by tag."""

    def check(self, max_pixels: int) -> None:
        self._read_directories()
        if (compression := self._number(_COMPRESSION, 1)) not in _COMPRESSIONS:
            raise DataError(
                f"{SENT} is a TIFF of compression {compression}: of TIFFs that are sent, those without compression and with LZW, "
                "deflate or PackBits are decoded: store it anew"
            )
        if compression != 1 and not silence_libtiff():
            raise DataError(
                f"{SENT} is a compressed TIFF, and Pillow's libtiff cannot be used here: store it without compression, or as PNG"
            )
        if (colour := self._number(_COLOUR, 0)) not in _COLOURS:
            raise DataError(f"{SENT} is a TIFF of colour space {colour}: store it in grey, RGB or with a palette")
        width, height = self._number(_WIDTH), self._number(_HEIGHT)
        tiled = any(tag in self._page for tag in (*_TILES, *_TILE_SIDES))
        if tiled and any(tag in self._page for tag in _STRIPS):
            raise self._damaged("it has both strips and tiles")
        if tiled:
            across, down = (self._number(tag) for tag in _TILE_SIDES)
        else:
            across, down = width, min(self._number(_ROWS, height), height)
        if min(width, height, across, down) < 1:
            raise self._damaged("a side of 0")
        columns, rows = -(-width // across), -(-height // down)
        if tiled and columns * across * rows * down > max(max_pixels, 2 * width * height):
            raise DataError(f"{SENT} has {width}×{height} pixels in tiles of {across}×{down}: store it with smaller tiles")
        if not 1 <= (samples := self._number(_SAMPLES, 1)) <= MAX_SAMPLES:  # Pillow logs some of the others to standard error
            raise DataError(f"{SENT} has {samples} channels: of TIFFs that are sent, 1 to {MAX_SAMPLES} are decoded: {USE_TENSOR}")
        planes = samples if self._number(_PLANES, 1) == 2 else 1
        self._check_pieces(columns * rows * planes, *(_TILES if tiled else _STRIPS), compressed=compression != 1)

    def _check_pieces(self, count: int, offsets: int, lengths: int, *, compressed: bool) -> None:
        """Checks strips or tiles: their number, and that no part of the file is decoded twice."""
        if count > MAX_PIECES:
            raise DataError(f"{SENT} has {count:,} strips or tiles, more than the limit of {MAX_PIECES:,}: store it with larger ones")
        for tag in (offsets, lengths):
            if (compressed or tag == offsets or tag in self._page) and (tag not in self._page or self._page[tag][1] != count):
                raise self._damaged(f"its size takes {count:,} strips or tiles, and tag {tag} names another number")
        if lengths in self._page and sum(self._numbers(lengths)) > len(self._content):
            raise self._damaged("its strips or tiles are longer than the file")

    def _read_directories(self) -> None:
        """Reads the directories of all pages, and those that Pillow reads beside them."""
        waiting: list[tuple[int, int | None]] = [(self._unpack("I", 4)[0], None)]  # position, and the tag that refers to it
        pages: list[dict[int, _Entry]] = []
        entries = values = nbytes = 0
        while waiting:
            position, group = waiting.pop()
            (count,) = self._unpack("H", position)
            entries += 1 + count
            if entries > MAX_ENTRIES:
                raise self._too_much()
            tags = self._entries(position + 2, count, group)
            nbytes += sum(_nbytes(kind, number) for kind, number, _ in tags.values())
            values += sum(number for kind, number, _ in tags.values() if kind not in _BYTES)
            waiting += [(self._pointer(tag, tags[tag]), tag) for tag in _SUBDIRECTORIES if tag in tags]
            if group is None:
                pages.append(tags)
                following = self._unpack("I", position + 2 + 12 * count)[0]
                waiting += [(following, None)] if following else []
        if nbytes > len(self._content) or values > MAX_VALUES:
            raise self._too_much()
        self._page = pages[0]

    def _entries(self, start: int, count: int, group: int | None) -> dict[int, _Entry]:
        """The entries of one directory, by tag. Raises DataError where Pillow and libtiff would differ, or Pillow would write a warning."""
        tags: dict[int, _Entry] = {}
        for at in range(start, start + 12 * count, 12):
            tag, kind, number, pointer = self._unpack("HHII", at)
            inside = _nbytes(kind, number) <= 4
            if tag in tags:  # Pillow reads the last one, libtiff the first
                raise self._damaged(f"tag {tag} twice")
            if not inside and pointer + _nbytes(kind, number) > len(self._content):
                raise self._damaged(f"tag {tag} lies outside the file")
            if number > 1 and kind not in _BYTES and TiffTags.lookup(tag, group).length == 1:
                raise self._damaged(f"tag {tag} has {number:,} values in place of one")
            tags[tag] = kind, number, at + 8 if inside else pointer
        return tags

    def _pointer(self, tag: int, entry: _Entry) -> int:
        kind, number, at = entry
        if kind not in _LONG or number != 1:
            raise self._damaged(f"tag {tag} is no position")
        return self._unpack("I", at)[0]

    def _number(self, tag: int, default: int | None = None) -> int:
        """The one value of a tag of the first page. Raises DataError without it and without a default."""
        if tag not in self._page:
            if default is None:
                raise self._damaged(f"no tag {tag}")
            return default
        return self._numbers(tag)[0]

    def _numbers(self, tag: int) -> tuple[int, ...]:
        kind, number, at = self._page[tag]
        if kind not in _WHOLE or number < 1:
            raise self._damaged(f"tag {tag} holds no whole number")
        return self._unpack(f"{number}{_WHOLE[kind]}", at)

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(f"{self._order}{form}", self._content, at)

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{SENT} is no sound TIFF ({what}): store it anew")

    def _too_much(self) -> DataError:
        return DataError(
            f"{SENT} has more metadata than a picture has ({MAX_ENTRIES} tags are taken, and none twice): store it anew, without"
        )


def _nbytes(kind: int, number: int) -> int:
    """Bytes of the values of a tag; of an unknown type as many as of the largest one."""
    return number * _SIZES.get(kind, 8)
