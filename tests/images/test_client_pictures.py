"""Pictures from bytes: the limits on what a client may send."""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.errors import DataError
from muntin.images import (
    decode_image,
    encode_png,
    pixel_count,
    read_image,
    write_image,
)


def photo(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_bytes_and_file_agree(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (21, 34, 3)).astype(np.uint8)
    for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
        write_image(tmp_path / f"a{suffix}", pixels)
        content = (tmp_path / f"a{suffix}").read_bytes()
        np.testing.assert_array_equal(decode_image(content), read_image(tmp_path / f"a{suffix}"))
        np.testing.assert_array_equal(decode_image(content, 1), read_image(tmp_path / f"a{suffix}", 1))
        assert pixel_count(content) == 714
        for read in (decode_image, pixel_count):
            with pytest.raises(DataError, match="limit of 713"):
                read(content, max_pixels=713)
        with pytest.raises(DataError, match="the picture"):
            decode_image(content[: len(content) // 2])


def progressive(scans: int, **options: Any) -> bytes:
    """A JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.fromarray(photo(40, 24)).save(buffer, "JPEG", progressive=True, **options)
    whole = buffer.getvalue()
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - whole.count(b"\xff\xda")) + whole[-2:]


def test_too_many_scans() -> None:
    assert decode_image(progressive(64)).shape == (40, 24, 3)
    hidden = progressive(1000).replace(b"\xff\xda", b"\xff\x01\xff\xff\xff\xda")  # a decoder passes over what has no length
    for read in (decode_image, pixel_count):
        with pytest.raises(DataError, match="1,000 scans"):
            read(hidden)
        with pytest.raises(DataError, match=r"the picture has 1,000 scans, more than the limit of 64: store it anew"):
            read(progressive(1000))
        with pytest.raises(DataError, match="65 scans"):
            read(progressive(65))


def test_scan_marker_in_metadata_or_after_the_end() -> None:
    many = b"\xff\xda" * 1000
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + many
    plain = progressive(10)
    np.testing.assert_array_equal(decode_image(progressive(10) + many), decode_image(plain))
    with_exif = plain[:2] + b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif + plain[2:]
    np.testing.assert_array_equal(decode_image(with_exif), decode_image(plain))


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"BM" + b"x" * 90, b"II*\x00" + b"x" * 90, b"\x93NUMPY", b"RIFF0000WAVE"])
def test_bytes_of_other_formats(content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(content)
    with pytest.raises(DataError, match=re.escape(str(caught.value))):
        pixel_count(content)
    assert "\n" not in str(caught.value)


def test_bmp() -> None:
    content = {}
    for mode in ("RGB", "L", "P", "1"):
        buffer = io.BytesIO()
        Image.fromarray(photo()).convert(mode).save(buffer, "BMP")
        content[mode] = buffer.getvalue()
        np.testing.assert_array_equal(decode_image(content[mode]), np.array(Image.fromarray(photo()).convert(mode).convert("RGB")))
    for compression in (1, 2, 4):
        runs = content["L"][:30] + compression.to_bytes(4, "little") + content["L"][34:]
        for read in (decode_image, pixel_count):
            with pytest.raises(DataError, match=f"the picture is a BMP of compression {compression}: store it without compression"):
                read(runs)


def with_segments(count: int, kind: int = 0xE1, content: bytes = b"Exif\0\0" + bytes(12)) -> bytes:
    """A JPEG with so many segments more."""
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "JPEG")
    whole = buffer.getvalue()
    return whole[:2] + count * (bytes([0xFF, kind]) + (2 + len(content)).to_bytes(2, "big") + content) + whole[2:]


def with_chunks(count: int, kind: bytes = b"prVt") -> bytes:
    whole = encode_png(photo())
    chunk = b"\0\0\0\0" + kind + zlib.crc32(kind).to_bytes(4, "big")
    return whole[:33] + count * chunk + whole[33:]


@pytest.mark.parametrize(
    ("few", "many"),
    [
        (with_segments(20), with_segments(65)),
        (with_segments(200, 0xFE, b"a comment"), with_segments(257, 0xFE, b"a comment")),
        (with_segments(0), b"\xff\xd8\xff" + bytes(1 << 20)),
        (with_segments(0), b"\xff\xd8" + b"\xff" * (1 << 20)),
        (with_segments(0), b"\xff\xd8" + b"\xff\x00" * (1 << 20)),
        (with_segments(0), with_segments(0)[:2] + b"\xff\xd0" * 300 + with_segments(0)[2:]),
        (with_chunks(200), with_chunks(300)),
        (with_chunks(200, b"IDAT"), with_chunks(300, b"IDAT")),
    ],
)
def test_too_much_metadata(few: bytes, many: bytes) -> None:
    for read in (decode_image, pixel_count):
        read(few)
        with pytest.raises(DataError, match="more metadata than a picture has"):
            read(many)


def test_scans_after_reserved_markers() -> None:
    """A decoder that looks for where it may go on passes over such bytes, and what comes behind them is a scan."""
    whole = progressive(10)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    hidden = whole[:-2] + b"\xff\x02\xfe\xfe" + scan * (0xFEFE // len(scan)) + b"\xff\xd9"
    with pytest.raises(DataError, match="scans, more than the limit"):
        decode_image(hidden)
