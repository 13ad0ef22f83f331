"""Pictures from files: formats, channels, orientation, damage, limits."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFile

from muntin.errors import DataError
from muntin.images import (
    TooManyPixelsError,
    decode_image,
    image_size,
    opening,
    pixel_count,
    read_image,
    read_mask,
    write_image,
)

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
def test_lossless_formats(tmp_path: Path, image: np.ndarray[Any, np.dtype[np.uint8]], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".bmp" and image.shape[2] == 4:
        image = image[:, :, :3]
    write_image(path, image)
    np.testing.assert_array_equal(read_image(path, None), image)
    assert image_size(path) == image.shape[:2]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 48, 3))
    write_image(tmp_path / f"a{suffix}", ramp)
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - ramp).max() < 12


def test_channel_conversion(tmp_path: Path) -> None:
    grey, colored, clear = photo(channels=1), photo(), photo(channels=4)
    for name, image in (("grey", grey), ("colored", colored), ("clear", clear)):
        write_image(tmp_path / f"{name}.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", 3), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png", 3), clear[:, :, :3])
    assert read_image(tmp_path / "colored.png", 1).shape == (12, 17, 1)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "colored.png", 4)
    one_line(error, "has 3 channels, 4 are wanted")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
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


def test_exif_orientation_after_the_pixels(tmp_path: Path) -> None:
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


def test_size_without_pixels(write_png: Callable[..., None], tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", width=5, height=4, depth=8, kind=0, rows=b"")
    assert image_size(tmp_path / "a.png") == (4, 5)
    with pytest.raises(DataError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_decoding_without_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    load, alone = ImageFile.ImageFile.load, []

    def watched(picture: ImageFile.ImageFile) -> Any:
        alone.append(opening._pillow_lock.locked())
        return load(picture)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    write_image(tmp_path / f"a{suffix}", photo(9, 9))
    alone.clear()
    for read in (read_image, read_mask):
        read(tmp_path / f"a{suffix}")
    assert alone
    assert not any(alone)


def test_npy_channels(tmp_path: Path) -> None:
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


def test_mapped_npy_larger_than_memory(tmp_path: Path) -> None:
    """60 GB that nobody wrote: a file of holes."""
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (100_000, 200_000, 3)})
        file.truncate(file.tell() + 60_000_000_000)
        file.seek(-3, os.SEEK_END)
        file.write(b"abc")
    with pytest.raises(TooManyPixelsError):
        read_image(tmp_path / "a.npy", mapped=True)
    image = read_image(tmp_path / "a.npy", max_pixels=1 << 40, mapped=True)
    assert image.shape == (100_000, 200_000, 3)
    assert bytes(image[-1, -1]) == b"abc"
    np.save(tmp_path / "grey.npy", np.asfortranarray(photo(channels=1)[:, :, 0]))
    np.testing.assert_array_equal(read_image(tmp_path / "grey.npy", 1, mapped=True), photo(channels=1))
    with pytest.raises(DataError, match="3 are wanted"):
        read_image(tmp_path / "grey.npy", mapped=True)


def test_npy_with_pickled_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / "a.npy")
    one_line(error, "object")


def test_files_that_are_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image\nat all")
    (tmp_path / "folder.png").mkdir()
    for name, word in (("empty.png", "empty"), ("text.png", "no image that muntin reads"), ("folder.png", "folder"), ("none.png", "exist")):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(DataError) as error:
                read(tmp_path / name)
            one_line(error, name, word)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_several_pages_or_frames(tmp_path: Path, suffix: str) -> None:
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


def test_damaged_tiff_in_a_new_process(tmp_path: Path) -> None:
    """libtiff writes lines of its own, until the first TIFF of a process is opened by muntin."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.tif", compression="tiff_lzw")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:60] + bytes(8000) + content[8060:])
    code = "import sys; from muntin.images import read_image; read_image(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tif"], capture_output=True, text=True, check=False)
    assert "a.tif is damaged or cut off" in done.stderr
    assert "Using code not yet in table" not in done.stderr


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff_overviews(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "map.tif"
    overview = Image.fromarray(photo()[::2, ::2])
    overview.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(photo()).save(path, save_all=True, append_images=[overview], compression=compression)
    with Image.open(path) as picture:
        assert picture.n_frames == 2  # type: ignore[attr-defined]
    assert image_size(path) == (12, 17)
    np.testing.assert_array_equal(read_image(path), photo())


def test_sixteen_bits(write_png: Callable[..., None], tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 70000, dtype=np.int32)).save(tmp_path / "grey.tif")
    deep = b"".join(b"\x00" + bytes(range(4 * 6)) for _ in range(3))
    write_png(tmp_path / "colored.png", width=4, height=3, depth=16, kind=2, rows=deep)
    for name in ("grey.tif", "colored.png"):
        with pytest.raises(DataError) as error:
            read_image(tmp_path / name)
        one_line(error, "more than 8 bits")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_of_separate_planes(tmp_path: Path, dtype: type[Any]) -> None:
    image = photo().astype(dtype)
    write_tiff(tmp_path / "a.tif", image, planar=True)
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
@pytest.mark.parametrize("requested", [None, 1, 3, 4])
def test_tiff_of_unnamed_channels(tmp_path: Path, channels: int, color: bool, said: str, requested: int | None) -> None:
    image = np.dstack([photo(), photo()])[:, :, :channels]
    write_tiff(tmp_path / "a.tif", image, color=color)
    for read in (lambda path: read_image(path, requested), read_mask, image_size):
        with pytest.raises(DataError) as error:
            read(tmp_path / "a.tif")
        one_line(error, "a.tif", said)
    write_tiff(tmp_path / "b.tif", image[:, :, : 3 if color else 1], color=color)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif", None), image[:, :, : 3 if color else 1])


def write_tiff(path: Path, image_HWC: np.ndarray[Any, Any], *, color: bool = True, planar: bool = False) -> None:
    """An uncompressed TIFF as Pillow does not write it: channels beyond the colours have no named kind. `planar`: a strip a channel."""
    height, width, channels = image_HWC.shape
    little = image_HWC.astype(image_HWC.dtype.newbyteorder("<"))
    strips = [little[:, :, channel].tobytes() for channel in range(channels)] if planar else [little.tobytes()]
    unnamed, short, long = channels - (3 if color else 1), 3, 4
    tags = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [8 * image_HWC.dtype.itemsize] * channels),
        (259, short, [1]),  # no compression
        (262, short, [2 if color else 1]),  # RGB or grey
        (273, long, [0] * len(strips)),  # offsets of the strips, set below
        (277, short, [channels]),
        (278, long, [height]),
        (279, long, list(map(len, strips))),
        (338, short, [0] * unnamed) if unnamed else (284, short, [2 if planar else 1]),
    ]
    end = 8 + 2 + len(tags) * 12 + 4  # of the directory; values that do not fit into it follow
    start = end + sum(size for _, kind, values in tags if (size := len(values) * (2 if kind == short else 4)) > 4)
    tags[5] = (273, long, [start + sum(map(len, strips[:number])) for number in range(len(strips))])
    directory, further = struct.pack("<H", len(tags)), b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == short else 'I'}", *values)
        directory += struct.pack("<HHI", tag, kind, len(values))
        directory += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(further))
        further += packed if len(packed) > 4 else b""
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + further + b"".join(strips))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".npy"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", photo(64, 64))
    content = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError) as error:
        read_image(tmp_path / f"a{suffix}")
    one_line(error, f"a{suffix}", "damaged or cut off")


@given(data=st.data(), suffix=st.sampled_from([".png", ".jpg", ".webp", ".tif", ".bmp", ".npy"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
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


def test_tiff_with_truncated_second_page(tmp_path: Path) -> None:
    write_image(tmp_path / "a.tif", photo(9, 9))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[3], content[130] = 0, 1  # where the next page would begin, its list of tags has no end
    (tmp_path / "a.tif").write_bytes(content[:140])
    with pytest.raises(DataError):
        read_image(tmp_path / "a.tif", None)


@pytest.mark.parametrize("suffix", [".tif", ".webp"])
def test_limit_of_pixels_with_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", photo(9, 9))
    for limit in (60, 30):  # beyond it Pillow warns, beyond twice as much it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_image(tmp_path / f"a{suffix}").shape == (9, 9, 3)
    assert image_size(tmp_path / f"a{suffix}", max_pixels=81) == (9, 9)
    assert Image.MAX_IMAGE_PIXELS == 30
    for limit in (20, 80):  # below Pillow's, and above it
        with pytest.raises(TooManyPixelsError) as error:
            read_image(tmp_path / f"a{suffix}", max_pixels=limit)
        one_line(error, f"a{suffix} has ", f"the limit of {limit}")


def test_limit_of_pixels(write_png: Callable[..., None], tmp_path: Path) -> None:
    write_png(tmp_path / "bomb.png", width=30000, height=30000, depth=8, kind=0, rows=b"")
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
from muntin.images import image_size, read_image
image_size(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
try:
    read_image(sys.argv[1])
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count pages for us")
def test_picture_larger_than_memory(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((10_000, 10_000), np.uint8))
    done = subprocess.run([sys.executable, "-c", NO_MEMORY, str(tmp_path / "a.png")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'a.png'} needs more memory than there is, unless its header lies: cut it")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("dpi", [False, True])
def test_unreadable_exif(tmp_path: Path, format: str, dpi: bool) -> None:
    if dpi and format == "WEBP":
        pytest.skip("it has none")
    path = tmp_path / f"a.{format.lower()}"
    options: dict[str, Any] = {"dpi": (300, 300)} if dpi else {}
    Image.fromarray(photo()).save(path, format, exif=b"Exif\0\0" + bytes(64), **options)
    assert decode_image(path.read_bytes()).shape == photo().shape
    assert read_image(path).shape == photo().shape
    assert image_size(path) == photo().shape[:2]
