"""TIFF files from clients: what is decoded, and what is refused before a decoder sees it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from muntin.errors import DataError
from muntin.images import decode_image, pixel_count

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
SHORT, LONG, UNDEFINED = 3, 4, 7
WIDTH, HEIGHT, BITS, COMPRESSION, COLOUR, OFFSETS, SAMPLES, ROWS, LENGTHS = 256, 257, 258, 259, 262, 273, 277, 278, 279
EXIF = 34665
Tags = dict[int, tuple[int, list[int]]]


def by_pillow(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def directory(tags: Tags, at: int, following: int = 0, order: str = "<") -> bytes:
    """A directory at a position of the file, and the values that do not fit into its entries."""
    values_at = at + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{ {SHORT: 'H', LONG: 'I', UNDEFINED: 'B'}[kind] }", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}I", values_at + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    return struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", following) + values


def grey(pixels: np.ndarray, changes: Tags | None = None, *, following: int = 0, order: str = "<", more: bytes = b"") -> bytes:
    """A grey TIFF without compression, in one strip unless `changes` says otherwise. `more`: bytes after its pixels."""
    height, width = pixels.shape
    data = pixels.tobytes() + more
    tags: Tags = {
        WIDTH: (LONG, [width]), HEIGHT: (LONG, [height]), BITS: (SHORT, [8]), COMPRESSION: (SHORT, [1]), COLOUR: (SHORT, [1]),
        OFFSETS: (LONG, [8]), SAMPLES: (SHORT, [1]), ROWS: (LONG, [height]), LENGTHS: (LONG, [pixels.size]),
    }  # fmt: skip
    tags |= changes or {}
    tags = {tag: entry for tag, entry in tags.items() if entry[1]}
    at = 8 + len(data)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return head + data + directory(tags, at, following, order)


def refusal(content: bytes, **options: Any) -> str:
    """The error of both functions, one line."""
    texts = set()
    for read in (decode_image, pixel_count):
        with pytest.raises(DataError) as caught:
            read(content, **options)
        texts.add(str(caught.value))
    (text,) = texts
    assert "\n" not in text
    assert "the picture" in text
    return text


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("options", [{}, {"tiffinfo": {ROWS: 5}}])
def test_compressions(compression: str, options: dict[str, Any]) -> None:
    content = by_pillow(Image.fromarray(PHOTO), compression=compression, **options)
    np.testing.assert_array_equal(decode_image(content), PHOTO)
    assert pixel_count(content) == 12 * 17
    with pytest.raises(DataError, match="limit of 203"):
        decode_image(content, max_pixels=203)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA"])
def test_modes(mode: str) -> None:
    picture = Image.fromarray(PHOTO).convert(mode)
    content = by_pillow(picture)
    np.testing.assert_array_equal(decode_image(content), np.array(picture.convert("RGB")))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_exif_and_overviews(order: str) -> None:
    pixels = PHOTO[:, :, 0]
    at = 8 + pixels.size
    exif_at = at + 2 + 12 * 11 + 4
    overview_at = exif_at + 2 + 12 + 4
    exif = directory({37380: (SHORT, [1])}, exif_at, following=77, order=order)  # cameras leave anything as the next one of EXIF
    overview = directory(
        {254: (LONG, [1]), WIDTH: (LONG, [1]), HEIGHT: (LONG, [1]), BITS: (SHORT, [8]), COLOUR: (SHORT, [1]), OFFSETS: (LONG, [8])},
        overview_at,
        order=order,
    )
    content = grey(pixels, {EXIF: (LONG, [exif_at]), 274: (SHORT, [6])}, following=overview_at, order=order) + exif + overview
    np.testing.assert_array_equal(decode_image(content, 1)[:, :, 0], np.rot90(pixels, -1))


def test_tiles() -> None:
    pixels = np.arange(48 * 32, dtype=np.uint8).reshape(48, 32)
    tiles = pixels.reshape(3, 16, 2, 16).transpose(0, 2, 1, 3).reshape(-1, 16)
    tags: Tags = {ROWS: (LONG, []), OFFSETS: (LONG, []), LENGTHS: (LONG, []), 322: (SHORT, [16]), 323: (SHORT, [16])}
    tags |= {WIDTH: (LONG, [32]), HEIGHT: (LONG, [48]), 324: (LONG, [8 + 256 * k for k in range(6)]), 325: (LONG, [256] * 6)}
    np.testing.assert_array_equal(decode_image(grey(tiles, tags), 1)[:, :, 0], pixels)
    huge = tags | {322: (LONG, [1 << 15]), 323: (LONG, [1 << 15]), 324: (LONG, [8]), 325: (LONG, [256])}
    assert "in tiles of 32768×32768" in refusal(grey(tiles, huge), max_pixels=1 << 20)
    assert "both strips and tiles" in refusal(grey(tiles, tags | {OFFSETS: (LONG, [8])}))
    assert "no sound TIFF (a side of 0)" in refusal(grey(tiles, tags | {322: (SHORT, [0])}))


def test_damaged_pixels_write_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        content = by_pillow(Image.fromarray(PHOTO), compression=compression)
        with pytest.raises(DataError, match="the picture is damaged"):
            decode_image(content[:8] + bytes(len(content[8:100])) + content[100:])
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("muntin.images.client_tiff.silence_libtiff", lambda: False)
    assert "store it without compression, or as PNG" in refusal(content)
    assert decode_image(by_pillow(Image.fromarray(PHOTO))).shape == PHOTO.shape


def test_other_compressions_and_colours() -> None:
    photo = Image.fromarray(PHOTO)
    assert "TIFF of compression 7: of TIFFs that are sent" in refusal(by_pillow(photo, compression="jpeg"))
    assert "TIFF of compression 4" in refusal(by_pillow(photo.convert("1"), compression="group4"))
    assert "colour space 5" in refusal(by_pillow(photo.convert("CMYK")))
    assert "is a BigTIFF" in refusal(by_pillow(photo, big_tiff=True))
    deep = by_pillow(Image.fromarray(np.full((3, 4), 7000, np.uint16)))
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        decode_image(deep)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({OFFSETS: (LONG, [8] * 12)}, "takes 1 strips or tiles, and tag 273 names another number"),  # decoded twelve times
        ({OFFSETS: (LONG, [8] * 12), ROWS: (LONG, [1])}, "tag 279 names another number"),
        ({ROWS: (LONG, [1]), OFFSETS: (LONG, [8] * 12), LENGTHS: (LONG, [204] * 12)}, "longer than the file"),
        ({COMPRESSION: (SHORT, [5]), LENGTHS: (LONG, [])}, "tag 279 names another number"),
        ({WIDTH: (LONG, [1]), HEIGHT: (LONG, [1 << 17]), ROWS: (LONG, [1])}, "131,072 strips or tiles, more than the limit of 65,536"),
        ({WIDTH: (LONG, [])}, "no tag 256"),
        ({WIDTH: (UNDEFINED, [17])}, "tag 256 holds no whole number"),
        ({HEIGHT: (LONG, [0])}, "a side of 0"),
        ({HEIGHT: (LONG, [12, 12])}, "tag 257 has 2 values in place of one"),
        ({SAMPLES: (SHORT, [40_000])}, "has 40000 channels: of TIFFs that are sent, 1 to 4 are decoded: send it as a tensor"),
        ({EXIF: (SHORT, [8])}, "tag 34665 is no position"),
        ({EXIF: (LONG, [1 << 30])}, "is damaged or cut off"),
        ({tag: (SHORT, [1]) for tag in range(40_000, 40_300)}, "256 tags are taken"),
        ({50_000: (SHORT, [1] * 300_000)}, "more metadata than a picture has"),
    ],
)
def test_hostile_directories(changes: Tags, message: str) -> None:
    assert message in refusal(grey(PHOTO[:, :, 0], changes))


def test_data_that_many_tags_share() -> None:
    """Each of 200 tags refers to the whole file."""
    whole = grey(PHOTO[:, :, 0], {tag: (UNDEFINED, [0] * 8) for tag in range(50_000, 50_200)}, more=bytes(10_000))
    shared = bytearray(whole)
    for tag in range(50_000, 50_200):
        at = whole.index(struct.pack("<HHI", tag, UNDEFINED, 8))
        shared[at + 4 : at + 12] = struct.pack("<II", len(whole), 0)
    assert decode_image(whole, 1).shape == (12, 17, 1)
    assert "none twice" in refusal(bytes(shared))


def test_pages_and_loops() -> None:
    pixels = PHOTO[:, :, 0]
    at = 8 + pixels.size
    assert "256 tags are taken" in refusal(grey(pixels, following=at))  # its own next page
    assert "256 tags are taken" in refusal(grey(pixels, {EXIF: (LONG, [at])}))
    page = grey(pixels)
    chain = b"".join(struct.pack("<HI", 0, len(page) + 6 * k) for k in range(1, 1000))
    assert "256 tags are taken" in refusal(grey(pixels, following=len(page)) + chain)
    twice = page.replace(struct.pack("<HHI", HEIGHT, LONG, 1), struct.pack("<HHI", WIDTH, LONG, 1))
    assert "tag 256 twice" in refusal(twice)
    pages = [Image.fromarray(PHOTO)] * 3
    assert "holds 3 pages" in refusal(by_pillow(pages[0], save_all=True, append_images=pages[1:]))


SEEDS = (by_pillow(Image.fromarray(PHOTO), compression="tiff_lzw"), grey(PHOTO[:, :, 0]), by_pillow(Image.fromarray(PHOTO).convert("P")))


@given(seed=st.sampled_from(SEEDS), at=st.integers(0, 2000), change=st.binary(min_size=1, max_size=6), cut=st.integers(0, 400))
def test_mutated_bytes(seed: bytes, at: int, change: bytes, cut: int) -> None:
    at %= len(seed)
    content = seed[:at] + change + seed[at + len(change) : max(at, len(seed) - max(0, cut - 300))]
    for read in (decode_image, pixel_count):
        outcome = _outcome(read, content)
        assert outcome is None or "\n" not in outcome


def _outcome(read: Callable[..., Any], content: bytes) -> str | None:
    try:
        read(content, max_pixels=1 << 16)
    except DataError as error:
        return str(error)
    return None
