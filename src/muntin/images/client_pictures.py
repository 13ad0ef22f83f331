"""Pictures in bytes that a client sent: limits on what a small file can make a decoder do."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import BmpImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from muntin.errors import DataError
from muntin.images.client_tiff import check_tiff
from muntin.images.opening import HEAD_BYTES, SENT, decoder_of, opened_picture

MAX_SCANS = 64
"""Scans of a JPEG. Each is decoded over the whole picture, and an empty one takes about 10 bytes; encoders write about 10 scans."""
MAX_PARTS = 256
"""Segments of a JPEG before its first scan; chunks of a PNG that hold no pixels. Pillow reads them in Python, some together with all
earlier ones: a million would take minutes."""
_MAX_EXIF = 64
"""EXIF segments of a JPEG, each of which Pillow joins to the earlier ones."""
_MAX_STRAY_BYTES = 1 << 16
"""Bytes between a JPEG's segments, which Pillow reads one by one."""
_PNG = b"\x89PNG\r\n\x1a\n"
_UNPACKED_BMP = (0, 3)
"""Compressions of a BMP without run lengths, which Pillow decodes in Python."""
_SCAN = b"\xff\xda"
_SEGMENT = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd7\xff]")
"""Start of a JPEG segment that states its length. After 255, a zero is a byte of a scan, 1 to 191 are reserved (a decoder that
resynchronises skips them), and the others excluded here have no length."""


@contextmanager
def opened_bytes(content: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Reads the header of a PNG, JPEG, WebP, TIFF or BMP in `content` and checks it, as `opened_picture` does. Raises DataError."""
    head = content[:HEAD_BYTES]
    decoder = decoder_of(head)
    if decoder is None:
        raise DataError(f"{len(content):,} bytes that are no PNG, JPEG, WebP, TIFF or BMP picture: send such a file")
    if decoder is JpegImagePlugin.JpegImageFile:
        _check_jpeg(content)
    elif decoder is PngImagePlugin.PngImageFile and not _chunks_fit(content):
        raise _too_much_metadata()
    elif decoder is TiffImagePlugin.TiffImageFile:
        check_tiff(content, max_pixels)
    elif decoder is BmpImagePlugin.BmpImageFile:
        _check_bmp(content)
    with opened_picture(SENT, io.BytesIO(content), head, max_pixels) as picture:
        yield picture


def _too_much_metadata() -> DataError:
    return DataError(f"{SENT} has more metadata than a picture has ({MAX_PARTS} parts are taken): store it anew, without")


def _check_bmp(content: bytes) -> None:
    """Raises DataError for a BMP of run lengths: a few bytes of it can stand for gigabytes."""
    compression = int.from_bytes(content[30:34], "little")
    if int.from_bytes(content[14:18], "little") > 12 and compression not in _UNPACKED_BMP:  # older headers have no compression
        raise DataError(f"{SENT} is a BMP of compression {compression}: store it without compression, or as PNG")


def _check_jpeg(content: bytes) -> None:
    """Raises DataError for a JPEG of too many scans or too much metadata."""
    if (marks := content.count(_SCAN)) > MAX_SCANS and _exceeds_scans(content, MAX_SCANS):
        raise DataError(f"{SENT} has {marks:,} scans, more than the limit of {MAX_SCANS}: store it anew")
    if content.count(b"Exif\0\0") > _MAX_EXIF or not _segments_fit(content):
        raise _too_much_metadata()


def _exceeds_scans(content: bytes, limit: int) -> bool:
    """Returns True for a JPEG of more scans. The same two bytes in metadata, and after the picture's end, are not scans."""
    position, scans = 2, 0
    while (segment := _SEGMENT.search(content, position)) and segment.group() != b"\xff\xd9":
        position = segment.end()
        scans += segment.group() == _SCAN
        if scans > limit:
            return True
        position += int.from_bytes(content[position : position + 2], "big")
    return False


def _segments_fit(content: bytes) -> bool:
    """Returns True for a JPEG of at most `MAX_PARTS` segments before its first scan, and few bytes between them, as Pillow reads it."""
    position, parts, stray = 2, 0, 0
    while (start := content.find(b"\xff", position)) >= 0 and start + 1 < len(content):
        stray += start - position
        kind = content[start + 1]
        position = start + 2
        if kind in (0x00, 0xFF):
            position -= kind == 0xFF
            stray += 1
        else:
            if kind == 0xDA:
                return True
            parts += 1
            if not (0xD0 <= kind <= 0xD9 or 0xF0 <= kind <= 0xFD or kind == 0xC8):  # these have no length
                position += int.from_bytes(content[position : position + 2], "big")
        if parts > MAX_PARTS or stray > _MAX_STRAY_BYTES:
            return False
    return len(content) - position <= _MAX_STRAY_BYTES  # without a scan


def _chunks_fit(content: bytes) -> bool:
    """Returns True for a PNG of at most `MAX_PARTS` chunks without pixels, whose pixels are not in countless tiny chunks."""
    position, parts, pixel_chunks = len(_PNG), 0, 0
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IDAT":
            pixel_chunks += 1
        else:
            parts += 1
        if parts > MAX_PARTS or pixel_chunks > MAX_PARTS + len(content) // 256:
            return False
        if kind == b"IEND":
            break
        position += 12 + length
    return True
