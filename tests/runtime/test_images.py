from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFile

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.runtime import images
from muntin.runtime.images import (
    colorize,
    decode_image,
    encode_png,
    image_size,
    overlay,
    pixel_count,
    read_image,
    read_mask,
    to_rgb,
    write_image,
    write_whole,
)

CLASSES = (ClassInfo(name="sea", color=(0, 0, 200)), ClassInfo(name="land", color=(0, 200, 0)))
pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])))


def photo(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def one_line(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@given(image=pictures, suffix=st.sampled_from([".png", ".tif", ".bmp", ".npy"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lossless_formats_give_back_what_was_written(tmp_path: Path, image: np.ndarray[Any, np.dtype[np.uint8]], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".bmp" and image.shape[2] == 4:
        image = image[:, :, :3]
    write_image(path, image)
    np.testing.assert_array_equal(read_image(path, None), image)
    assert image_size(path) == image.shape[:2]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_come_close(tmp_path: Path, suffix: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 48, 3))
    write_image(tmp_path / f"a{suffix}", ramp)
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - ramp).max() < 12


def test_channels_are_made_where_nothing_is_invented(tmp_path: Path) -> None:
    grey, colored, clear = photo(channels=1), photo(), photo(channels=4)
    for name, image in (("grey", grey), ("colored", colored), ("clear", clear)):
        write_image(tmp_path / f"{name}.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", 3), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png", 3), clear[:, :, :3])
    assert read_image(tmp_path / "colored.png", 1).shape == (12, 17, 1)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "colored.png", 4)
    one_line(error, "has 3 channels, 4 are wanted")


def test_palette_with_transparency_reads_as_colors(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [200, 100, 50]], [[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored, file = photo(4, 6), tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(file, exif=exif, lossless=True)
    upright = {  # what the standard says that a viewer does to the stored rows
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(read_image(file), upright)
    assert image_size(file) == upright.shape[:2]


def test_an_orientation_behind_the_pixels_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored := photo(4, 6)).save(tmp_path / "a.png")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(stored, -1))
    assert image_size(tmp_path / "a.png") == (6, 4)
    sound = chunk + content[-12:]
    (tmp_path / "b.png").write_bytes(content[:-12] + sound.replace(b"eXIf", b"eXIF"))  # of no meaning: as it lies
    assert image_size(tmp_path / "b.png") == (4, 6)


def test_a_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    png(tmp_path / "a.png", width=5, height=4, depth=8, kind=0, rows=b"")
    assert image_size(tmp_path / "a.png") == (4, 5)
    with pytest.raises(DataError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_pictures_are_decoded_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    load, alone = ImageFile.ImageFile.load, []

    def watched(picture: ImageFile.ImageFile) -> Any:
        alone.append(images._quiet_lock.locked())
        return load(picture)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    write_image(tmp_path / f"a{suffix}", photo(9, 9))
    alone.clear()
    for read in (read_image, read_mask):
        read(tmp_path / f"a{suffix}")
    assert alone
    assert not any(alone)


def test_many_channels_come_from_npy(tmp_path: Path) -> None:
    image = photo(channels=16)
    np.save(tmp_path / "a.npy", image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", 16), image)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "a.npy")
    one_line(error, "16 channels, 3 are wanted")
    np.save(tmp_path / "b.npy", photo(channels=17))
    with pytest.raises(DataError):
        read_image(tmp_path / "b.npy", None)
    np.save(tmp_path / "c.npy", np.asfortranarray(image[:, :, 0]))
    np.testing.assert_array_equal(read_image(tmp_path / "c.npy", 1)[:, :, 0], image[:, :, 0])


def test_a_mapped_npy_is_read_where_it_is_looked_at(tmp_path: Path) -> None:
    """60 GB that nobody wrote: a file of holes."""
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (100_000, 200_000, 3)})
        file.truncate(file.tell() + 60_000_000_000)
        file.seek(-3, os.SEEK_END)
        file.write(b"abc")
    with pytest.raises(images.TooManyPixelsError):
        read_image(tmp_path / "a.npy", mapped=True)
    image = read_image(tmp_path / "a.npy", max_pixels=1 << 40, mapped=True)
    assert image.shape == (100_000, 200_000, 3)
    assert bytes(image[-1, -1]) == b"abc"
    np.save(tmp_path / "grey.npy", np.asfortranarray(photo(channels=1)[:, :, 0]))
    np.testing.assert_array_equal(read_image(tmp_path / "grey.npy", 1, mapped=True), photo(channels=1))
    with pytest.raises(DataError, match="3 are wanted"):
        read_image(tmp_path / "grey.npy", mapped=True)


def test_npy_never_unpickles(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "a.npy")
    one_line(error, "object")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image\nat all")
    (tmp_path / "folder.png").mkdir()
    for name, word in (("empty.png", "empty"), ("text.png", "no image that muntin reads"), ("folder.png", "folder"), ("none.png", "exist")):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(DataError) as error:
                read(tmp_path / name)
            one_line(error, name, word)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_several_pictures_in_a_file_are_refused_not_cut_to_the_first(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"stack.{suffix}"
    pages = [Image.fromarray(photo() // (page + 1)) for page in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask, image_size):
        with pytest.raises(DataError) as error:
            read(path)
        one_line(error, f"stack.{suffix} holds 3 pages or frames", "store each in a file of its own")
    if suffix != "tif":
        for decode in (decode_image, pixel_count):
            with pytest.raises(DataError, match="the picture holds 3 pages or frames"):
                decode(path.read_bytes())
    pages[0].save(path, save_all=True, lossless=True)  # one that could have more
    np.testing.assert_array_equal(read_image(path), photo())


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_overviews_of_a_map_are_no_pictures_of_their_own(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "map.tif"
    overview = Image.fromarray(photo()[::2, ::2])
    overview.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(photo()).save(path, save_all=True, append_images=[overview], compression=compression)
    with Image.open(path) as picture:
        assert picture.n_frames == 2  # type: ignore[attr-defined]
    assert image_size(path) == (12, 17)
    np.testing.assert_array_equal(read_image(path), photo())


def test_sixteen_bits_are_refused_not_cut(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 70000, dtype=np.int32)).save(tmp_path / "grey.tif")
    deep = b"".join(b"\x00" + bytes(range(4 * 6)) for _ in range(3))
    png(tmp_path / "colored.png", width=4, height=3, depth=16, kind=2, rows=deep)
    for name in ("grey.tif", "colored.png"):
        with pytest.raises(DataError) as error:
            read_image(tmp_path / name)
        one_line(error, "more than 8 bits")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_channels_lie_apart_is_read_in_8_bits_and_refused_in_16(tmp_path: Path, dtype: type[Any]) -> None:
    image = photo().astype(dtype)
    planar_tiff(tmp_path / "a.tif", image)
    assert image_size(tmp_path / "a.tif") == (12, 17)
    if dtype is np.uint8:
        for read in (read_image, read_mask):
            np.testing.assert_array_equal(read(tmp_path / "a.tif"), image)
        return
    for read, word in ((read_image, "more than 8 bits"), (read_mask, "16-bit colours")):
        with pytest.raises(DataError) as error:
            read(tmp_path / "a.tif")
        one_line(error, "a.tif", word)


@pytest.mark.parametrize(
    ("channels", "color", "said"),
    [
        (4, True, "has 4 channels, of which 3 would be read: store it as a .npy array"),
        (5, True, "has 5 channels, of which 3 would be read"),
        (2, False, "has 2 channels, of which 1 would be read"),
        (4, False, "channels of a number or kind that is not read from TIFF: store it as a .npy array"),
    ],
)
@pytest.mark.parametrize("wanted", [None, 1, 3, 4])
def test_a_tiff_of_more_channels_than_would_be_read_is_refused(
    tmp_path: Path, channels: int, color: bool, said: str, wanted: int | None
) -> None:
    image = np.dstack([photo(), photo()])[:, :, :channels]
    chunky_tiff(tmp_path / "a.tif", image, color=color)
    for read in (lambda path: read_image(path, wanted), read_mask, image_size):
        with pytest.raises(DataError) as error:
            read(tmp_path / "a.tif")
        one_line(error, "a.tif", said)
    chunky_tiff(tmp_path / "b.tif", image[:, :, : 3 if color else 1], color=color)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif", None), image[:, :, : 3 if color else 1])


def chunky_tiff(path: Path, image_HWC: np.ndarray[Any, Any], *, color: bool) -> None:
    """An uncompressed TIFF made by hand, whose channels beyond its colours are of no kind that it names."""
    height, width, channels = image_HWC.shape
    beyond = channels - (3 if color else 1)
    short, long = 3, 4
    head = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, head if channels > 2 else 8 | 8 << 16),  # bits of each channel
        (259, short, 1, 1),  # no compression
        (262, short, 1, 2 if color else 1),  # RGB or grey
        (273, long, 1, head + 2 * (channels + beyond)),  # where the pixels begin
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 1, image_HWC.size),  # their bytes
        (338, short, beyond, head + 2 * channels if beyond > 2 else 0) if beyond else (284, short, 1, 1),  # the kinds of those beyond
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    bits = struct.pack(f"<{channels}H", *[8] * channels) + bytes(2 * beyond)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + bits + image_HWC.tobytes())


def planar_tiff(path: Path, image_HWC: np.ndarray[Any, Any]) -> None:
    """An uncompressed TIFF made by hand, a strip a channel, as Pillow does not write it."""
    height, width, channels = image_HWC.shape
    planes = [image_HWC[:, :, channel].astype(image_HWC.dtype.newbyteorder("<")).tobytes() for channel in range(channels)]
    head = 8 + 2 + 10 * 12 + 4  # the file's, and a directory of ten tags; then what does not fit into these
    strips = [head + 6 + 12 + 12 + sum(map(len, planes[:channel])) for channel in range(channels)]
    short, long = 3, 4
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 3, head),  # bits of each channel
        (259, short, 1, 1),  # no compression
        (262, short, 1, 2),  # RGB
        (273, long, 3, head + 6),  # where the strips begin
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 3, head + 18),  # their bytes
        (284, short, 1, 2),  # the channels apart
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    values = struct.pack("<3H3I3I", *[8 * image_HWC.dtype.itemsize] * 3, *strips, *map(len, planes))
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + values + b"".join(planes))


def png(path: Path, *, width: int, height: int, depth: int, kind: int, rows: bytes) -> None:
    """A PNG made by hand, with bit depths that Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".npy"])
def test_truncated_files_are_errors(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", photo(64, 64))
    content = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError) as error:
        read_image(tmp_path / f"a{suffix}")
    one_line(error, f"a{suffix}", "damaged or truncated")


@given(data=st.data(), suffix=st.sampled_from([".png", ".jpg", ".webp", ".tif", ".bmp", ".npy"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_data_error_or_another_picture(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_image(path, photo(9, 9))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    for read in (lambda: read_image(path, None), lambda: read_mask(path), lambda: image_size(path)):
        try:
            read()
        except DataError as error:
            assert "\n" not in str(error)


def test_a_tiff_whose_next_page_is_cut_off_is_told_in_an_error_and_no_warning(tmp_path: Path) -> None:
    write_image(tmp_path / "a.tif", photo(9, 9))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[3], content[130] = 0, 1  # where the next page would begin, its list of tags has no end
    (tmp_path / "a.tif").write_bytes(content[:140])
    with pytest.raises(DataError):
        read_image(tmp_path / "a.tif", None)


def test_a_tiff_beyond_pillows_limit_is_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.tif", photo(9, 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert np.array_equal(read_image(tmp_path / "a.tif"), photo(9, 9))


@pytest.mark.parametrize("suffix", [".tif", ".webp"])
def test_pillows_own_limit_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", photo(9, 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert read_image(tmp_path / f"a{suffix}").shape == (9, 9, 3)
    assert image_size(tmp_path / f"a{suffix}", max_pixels=81) == (9, 9)
    assert Image.MAX_IMAGE_PIXELS == 30
    for limit in (20, 80):  # below Pillow's, and above it
        with pytest.raises(images.TooManyPixelsError) as error:
            read_image(tmp_path / f"a{suffix}", max_pixels=limit)
        one_line(error, f"a{suffix} has ", f"the limit of {limit}")


def test_the_limit_of_pixels_is_ours_and_settable(tmp_path: Path) -> None:
    png(tmp_path / "bomb.png", width=30000, height=30000, depth=8, kind=0, rows=b"")
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "bomb.png")
    one_line(error, "30000×30000", "268,435,456")
    big = np.zeros((13500, 13500), dtype=np.uint8)  # Pillow's own limit would refuse it
    write_image(tmp_path / "big.png", big)
    assert image_size(tmp_path / "big.png") == (13500, 13500)
    assert read_mask(tmp_path / "big.png").shape == (13500, 13500)
    with pytest.raises(DataError):
        read_image(tmp_path / "big.png", max_pixels=10**8)


NO_MEMORY = """
import resource, sys
from muntin.errors import DataError
from muntin.runtime.images import image_size, read_image
image_size(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
try:
    read_image(sys.argv[1])
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count pages for us")
def test_a_picture_that_there_is_no_memory_for_is_not_said_to_be_damaged(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((10_000, 10_000), np.uint8))
    done = subprocess.run([sys.executable, "-c", NO_MEMORY, str(tmp_path / "a.png")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'a.png'} needs more memory than there is, unless its header lies: cut it")
    assert done.stdout.count("\n") == 1


def test_masks_give_the_numbers_in_the_file(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [3, 2, 255]], dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200] + [7] * 756)
    palette.save(tmp_path / "palette.png")
    write_image(tmp_path / "grey.png", labels)
    np.save(tmp_path / "a.npy", labels.astype(np.int32))
    for name in ("palette.png", "grey.png", "a.npy"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), labels)
    assert read_mask(tmp_path / "palette.png", colors=True)[0].tolist() == [[9, 9, 9], [200, 0, 0], [0, 200, 0]]
    assert read_mask(tmp_path / "grey.png", colors=True)[0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    Image.fromarray(labels.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), labels.astype(np.uint16) * 300)


@pytest.mark.parametrize(("depth", "expected"), [(1, [0, 1, 1, 0]), (2, [0, 1, 2, 3]), (4, [0, 5, 10, 15])])
def test_masks_of_few_bits_are_not_spread_over_255(tmp_path: Path, depth: int, expected: list[int]) -> None:
    bits = "".join(f"{value:0{depth}b}" for value in expected).ljust(16, "0")
    packed = int(bits, 2).to_bytes(2, "big")[: -(-4 * depth // 8)]
    png(tmp_path / "a.png", width=4, height=1, depth=depth, kind=0, rows=b"\x00" + packed)
    assert read_mask(tmp_path / "a.png").tolist() == [expected]


def test_colored_masks_give_colors(tmp_path: Path) -> None:
    for channels in (3, 4):
        image = photo(channels=channels)
        write_image(tmp_path / "a.png", image)
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), image[:, :, :3])


def test_writing_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    wrong: list[tuple[str, np.ndarray[Any, Any]]] = [
        ("a.png", photo(channels=5)),
        ("a.png", photo().astype(np.float32)),
        ("a.jpg", photo(channels=4)),
        ("a.gif", photo()),
        ("none/a.png", photo()),
    ]
    for name, image in wrong:
        with pytest.raises(DataError) as error:
            write_image(tmp_path / name, image)
        one_line(error, "cannot write")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_image(tmp_path / "a.npy", photo(2, 2))
    before = (tmp_path / "a.npy").read_bytes()
    program = f"""
import resource, numpy as np
from muntin.runtime.images import write_image
from muntin.errors import DataError
from muntin.runtime import images
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_image({str(tmp_path / "a.npy")!r}, np.zeros((99, 99, 3), np.uint8))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.count("\n") == 1
    assert "cannot write" in done.stdout
    assert (tmp_path / "a.npy").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_write_whole_replaces(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_colorize_and_overlay() -> None:
    labels = np.array([[0, 1, 255]], dtype=np.uint8)
    assert colorize(labels, CLASSES).tolist() == [[[0, 0, 200], [0, 200, 0], [0, 0, 0]]]
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    assert overlay(image, labels, CLASSES, 0.5).tolist() == [[[50, 50, 150], [50, 150, 50], [100, 100, 100]]]
    np.testing.assert_array_equal(overlay(image, labels, CLASSES, 0), image)
    assert overlay(photo(1, 3, 7), labels.astype(np.int64), CLASSES).shape == (1, 3, 3)
    with pytest.raises(DataError):
        colorize(np.array([[2]]), CLASSES)
    with pytest.raises(DataError):
        overlay(photo(2, 3), labels, CLASSES)


def test_to_rgb() -> None:
    assert to_rgb(photo(channels=1)).shape == (12, 17, 3)
    np.testing.assert_array_equal(to_rgb(photo(channels=8)), photo(channels=8)[:, :, :3])


def test_reading_needs_no_torch() -> None:
    program = "import sys, muntin.runtime.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_picture_from_bytes_is_what_it_is_from_a_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (21, 34, 3)).astype(np.uint8)
    for suffix in (".png", ".jpg", ".webp"):
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


def test_a_jpeg_of_too_many_scans_is_not_decoded() -> None:
    assert decode_image(progressive(64)).shape == (40, 24, 3)
    hidden = progressive(1000).replace(b"\xff\xda", b"\xff\x01\xff\xff\xff\xda")  # a decoder passes over what has no length
    for read in (decode_image, pixel_count):
        with pytest.raises(DataError, match="1,000 scans"):
            read(hidden)
        with pytest.raises(DataError, match=r"the picture has 1,000 scans, more than the limit of 64: store it anew"):
            read(progressive(1000))
        with pytest.raises(DataError, match="65 scans"):
            read(progressive(65))


def test_what_looks_like_a_scan_in_a_jpegs_metadata_or_behind_it_is_none() -> None:
    many = b"\xff\xda" * 1000
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + many
    plain = progressive(10)
    np.testing.assert_array_equal(decode_image(progressive(10) + many), decode_image(plain))
    with_exif = plain[:2] + b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif + plain[2:]
    np.testing.assert_array_equal(decode_image(with_exif), decode_image(plain))


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"BM" + b"x" * 90, b"II*\x00" + b"x" * 90, b"\x93NUMPY", b"RIFF0000WAVE"])
def test_other_bytes_are_no_picture(content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(content)
    with pytest.raises(DataError, match=re.escape(str(caught.value))):
        pixel_count(content)
    assert "\n" not in str(caught.value)


def test_encoded_labels_keep_their_numbers() -> None:
    labels = np.random.default_rng(6).integers(0, 3, (9, 11)).astype(np.uint8)
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    with Image.open(io.BytesIO(encode_png(labels, colors))) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), labels)
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), np.array(colors, np.uint8)[labels])
    np.testing.assert_array_equal(decode_image(encode_png(labels), 1)[:, :, 0], labels)


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
def test_metadata_without_end_is_not_read(few: bytes, many: bytes) -> None:
    for read in (decode_image, pixel_count):
        read(few)
        with pytest.raises(DataError, match="more metadata than a picture has"):
            read(many)


def test_scans_behind_what_is_no_segment_are_counted() -> None:
    """A decoder that looks for where it may go on passes over such bytes, and what comes behind them is a scan."""
    whole = progressive(10)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    hidden = whole[:-2] + b"\xff\x02\xfe\xfe" + scan * (0xFEFE // len(scan)) + b"\xff\xd9"
    with pytest.raises(DataError, match="scans, more than the limit"):
        decode_image(hidden)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("dpi", [False, True])
def test_a_picture_whose_exif_cannot_be_read_is_sound(tmp_path: Path, format: str, dpi: bool) -> None:
    if dpi and format == "WEBP":
        pytest.skip("it has none")
    path = tmp_path / f"a.{format.lower()}"
    options: dict[str, Any] = {"dpi": (300, 300)} if dpi else {}
    Image.fromarray(photo()).save(path, format, exif=b"Exif\0\0" + bytes(64), **options)
    assert decode_image(path.read_bytes()).shape == photo().shape
    assert read_image(path).shape == photo().shape
    assert image_size(path) == photo().shape[:2]
