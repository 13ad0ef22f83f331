"""Pictures as the world has them, read by all that reads pictures: right, or refused in one line that says what is allowed."""

from __future__ import annotations

import io
import json
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.data.folders import FolderSource
from muntin.errors import DataError
from muntin.images import decode_image, pixel_count, read_image, read_mask, write_image
from muntin.runtime import load, predict
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import FolderPair
from own_sources import folder_source

Array = np.ndarray[Any, np.dtype[np.uint8]]
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = PHOTO[:, :, :1]
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Passes of an interlaced PNG: first row, first column, steps of rows and columns."""
NO_FORMAT = "PNG, JPEG, WebP, TIFF"


def encoded(picture: Array | Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(*, width: int = 17, height: int = 12, depth: int = 8, kind: int = 2, interlaced: int = 0, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of unfiltered rows. `kind`: its colour type; `extra`: chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def rows_of(image: Array) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in image) if image.size else b""


def rotated(orientation: int) -> tuple[bytes, Array]:
    """A JPEG with an EXIF orientation, and its pixels as a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array(Image.open(io.BytesIO(encoded(PHOTO, "JPEG"))))
    turned = stored.transpose(1, 0, 2) if orientation >= 5 else stored
    flips = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[orientation]
    return encoded(PHOTO, "JPEG", exif=exif), turned[:: flips[0], :: flips[1]]


def decoded(content: bytes) -> tuple[bytes, Array]:
    """A picture, and its pixels by Pillow's own conversion."""
    return content, np.array(Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB"))


def palette() -> bytes:
    picture = Image.fromarray(PHOTO).quantize(8)
    return encoded(picture, "PNG", transparency=bytes(range(0, 240, 30)))


RIGHT: dict[str, Callable[[], tuple[bytes, Array]]] = {
    "1x1.png": lambda: (encoded(PHOTO[:1, :1], "PNG"), PHOTO[:1, :1]),
    "1x20000.png": lambda: (encoded(np.resize(PHOTO, (20_000, 1, 3)), "PNG"), np.resize(PHOTO, (20_000, 1, 3))),
    "20000x1.jpg": lambda: decoded(encoded(np.resize(PHOTO, (1, 20_000, 3)), "JPEG")),
    "grey.png": lambda: (encoded(GREY, "PNG"), np.repeat(GREY, 3, 2)),
    "grey.jpg": lambda: decoded(encoded(GREY, "JPEG")),
    "grey-alpha.png": lambda: (encoded(PHOTO[:, :, :2], "PNG"), np.repeat(GREY, 3, 2)),
    "rgba.png": lambda: (encoded(np.dstack([PHOTO, GREY]), "PNG"), PHOTO),
    "rgba.webp": lambda: (encoded(np.dstack([PHOTO, GREY]), "WEBP", lossless=True, exact=True), PHOTO),
    "bits.png": lambda: (encoded(Image.fromarray(GREY[:, :, 0] > 99), "PNG"), np.repeat(np.uint8(255) * (GREY > 99), 3, 2)),
    "cmyk.jpg": lambda: decoded(encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG")),
    "palette.png": lambda: decoded(palette()),
    "progressive.jpg": lambda: decoded(encoded(PHOTO, "JPEG", progressive=True)),
    "interlaced.png": lambda: (png(interlaced=1, rows=b"".join(rows_of(PHOTO[y::dy, x::dx]) for y, x, dy, dx in ADAM7)), PHOTO),
    "png-inside.jpg": lambda: (encoded(PHOTO, "PNG"), PHOTO),
    "jpeg-inside.tif": lambda: decoded(encoded(PHOTO, "JPEG")),
    "more-rows-than-it-says.png": lambda: (png(rows=rows_of(PHOTO) + bytes(1 << 26)), PHOTO),
    "one-frame.webp": lambda: (encoded(PHOTO, "WEBP", save_all=True, lossless=True), PHOTO),
    **{f"turned-{number}.jpg": lambda number=number: rotated(number) for number in range(1, 9)},  # type: ignore[misc]
}
FRAMES = [Image.fromarray(PHOTO // (n + 1)) for n in range(3)]
WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", r"empty \(0 bytes\): replace it|0 bytes that are no PNG"),
    "text.png": (lambda: b"not an image\nat all", NO_FORMAT),
    "cut-off.png": (lambda: encoded(PHOTO, "PNG")[:-60], "damaged or cut off"),
    "cut-off.jpg": (lambda: encoded(PHOTO, "JPEG")[:400], "damaged or cut off"),
    "cut-off.webp": (lambda: encoded(PHOTO, "WEBP")[:-60], "damaged or cut off"),
    "cut-off.tif": (lambda: encoded(PHOTO, "TIFF")[:300], "damaged or cut off|strips or tiles are longer than the file"),
    "no-pixels.png": (lambda: png(width=0, rows=b""), "damaged or cut off|has no pixels"),
    "deep-grey.png": (lambda: encoded(Image.fromarray(GREY[:, :, 0].astype(np.uint16) * 256), "PNG"), "more than 8 bits a channel"),
    "deep.png": (lambda: png(depth=16, rows=rows_of(np.repeat(PHOTO, 2, 2))), "more than 8 bits a channel"),
    "deep.tif": (lambda: encoded(Image.fromarray(GREY[:, :, 0].astype(np.uint16)), "TIFF"), "more than 8 bits a channel"),
    "animated.gif": (lambda: encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), NO_FORMAT),
    "animated.png": (lambda: encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "3 pages or frames, and one"),
    "animated.webp": (lambda: encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "3 pages or frames, and one"),
    "pages.tif": (lambda: encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "pages or frames, and one|several pages"),
    "bomb.png": (
        lambda: png(width=100_000, height=100_000, rows=bytes(1 << 20)),
        "100000×100000 pixels, more than the limit of 268,435,456",
    ),
    "text-bomb.png": (
        lambda: png(rows=rows_of(PHOTO), extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26)))),
        "more metadata than a picture has",
    ),
    "text-bombs.png": (
        lambda: png(rows=rows_of(PHOTO), extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 19))) * 200),
        "more metadata than a picture has",
    ),
}
SPECS = (ClassSpec(name="sea"), ClassSpec(name="land"))


def source_of(folder: Path, picture: Path, shape: tuple[int, int]) -> FolderSource:
    """A data set whose training picture is the one to test."""
    write_image(folder / "masks" / f"{picture.stem}.png", np.zeros(shape, np.uint8))
    for split in ("validation", "test"):
        write_image(folder / split / "images" / f"{split}.png", PHOTO)
        write_image(folder / split / "masks" / f"{split}.png", GREY % 2)
    others = {split: FolderPair(images=folder / split / "images", masks=folder / split / "masks") for split in ("validation", "test")}
    return folder_source(base=FolderPair(images=picture.parent, masks=folder / "masks"), classes=SPECS, **others)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "masks", "validation/images", "validation/masks", "test/images", "test/masks"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name", RIGHT)
def test_right_pictures(folder: Path, name: str) -> None:
    content, expected = RIGHT[name]()
    file = folder / "images" / name
    file.write_bytes(content)
    source = source_of(folder, file, expected.shape[:2])
    source.check()
    for image in (read_image(file), decode_image(content), source.split("train")[0].image):
        np.testing.assert_array_equal(image, expected)
    assert pixel_count(content) == expected[:, :, 0].size


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pictures(folder: Path, name: str) -> None:
    make, says = WRONG[name]
    content, file = make(), folder / "images" / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=says) as from_file:
        read_image(file)
    with pytest.raises(DataError, match=says) as from_bytes:
        decode_image(content)
    assert all("\n" not in str(error.value) and len(str(error.value)) < 300 for error in (from_file, from_bytes))
    if file.suffix != ".gif":  # not a picture's name, in a folder
        with pytest.raises(DataError, match=says):
            source_of(folder, file, PHOTO.shape[:2]).check()


def test_predict_hostile_folder(call: Callable[..., Any], tmp_path: Path, write_small: Callable[..., Path]) -> None:
    """All of them at once: the right ones are computed, the others named; exit code 1."""
    artifact, pictures = write_small(tmp_path / "artifact"), tmp_path / "pictures"
    pictures.mkdir()
    expected = {}
    for name, make in RIGHT.items():
        content, expected[name] = make()
        (pictures / name).write_bytes(content)
    for name, (make_wrong, _) in WRONG.items():
        (pictures / name).write_bytes(make_wrong())
    answer = call("predict", artifact, pictures, pictures / "animated.gif", "-o", tmp_path / "out", "--precision", "f32", "--json")
    document = json.loads(answer.out)
    assert answer.code == 1 and answer.err.count("\n") == len(WRONG) == len(document["failures"])
    session = load(artifact, precision="f32")
    masks = {Path(result["source"]).name: read_mask(result["mask"]) for result in document["results"]}
    assert masks.keys() == expected.keys()
    for name, image in expected.items():
        np.testing.assert_array_equal(masks[name], predict(session, image))


KILLED = """
import resource, signal, sys
from muntin.artifact import atomic_files
from muntin.cli import main

write = atomic_files.write_synced

def limited(file, data):
    if file.parent.name == "out":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    write(file, data)

atomic_files.write_synced = limited
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process in the middle of a write
sys.argv = ["muntin", "predict", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is POSIX's, the limits Linux's")
def test_killed_while_writing(call: Callable[..., Any], tmp_path: Path, write_small: Callable[..., Path]) -> None:
    """No result is half-written, and the next run writes all."""
    artifact = write_small(tmp_path / "artifact")
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    words = [artifact, tmp_path / "a.png", "-o", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    partial = list((tmp_path / "out").iterdir())
    assert [path.suffix for path in partial] == [".tmp"] and partial[0].stat().st_size == 100
    (result,) = call("predict", *words, "--json").document()["results"]
    assert read_mask(result["mask"]).shape == (300, 300)
