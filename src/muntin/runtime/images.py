"""Pictures in and out of files, without torch.

Reading recognises a file by its first bytes and hands it to Pillow's decoder of that format, so that the only limit on a
picture's size is the one stated here (`MAX_PIXELS`, an argument everywhere): `PIL.Image.open` would apply a process-wide
limit of its own, and warn. Its decoders of TIFF and WebP do so too, and are told the limit that is stated here while they look; WebP itself
ends at 16383 pixels a side. Every failure is a `DataError` of one line that names the file.

Axis letters: H, W rows and columns, C channels. Arrays are uint8 unless a docstring says otherwise.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from muntin.artifact.classes import ClassInfo
from muntin.artifact.writing import write_files
from muntin.errors import DataError

UInt8 = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".npy")
MAX_PIXELS = 1 << 28  # 16384 x 16384: 0.8 GB as RGB
MAX_CHANNELS = 16
MAX_SCANS = 64
"""Of a JPEG that was sent. Each is decoded over all of the picture, and an empty one takes some 10 bytes; encoders write about 10."""
IGNORED = 255  # the label of pixels that count neither in the loss nor in a metric
IGNORED_COLOR = (0, 0, 0)

_NPY = b"\x93NUMPY"
_HEAD_BYTES = 16
_TAIL_BYTES = 1 << 17
"""Of a PNG, where EXIF may lie behind the pixels: 64 KiB at most, and what else follows them."""
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd7\xff]")
"""Of a part of a JPEG that tells its length. Behind 255 a zero says that this is a scan's own byte, up to 191 there is no such part (a
decoder that looks for where it may go on passes them over); the others stand alone."""
MAX_PARTS = 256
"""Segments of a JPEG before its first scan, chunks of a PNG beside those of its pixels: Pillow, which reads them in Python, some of them
with all that came before, would take minutes for a million."""
_MAX_EXIF, _MAX_JUNK = 64, 1 << 16
"""Of a JPEG: EXIF segments, each of which Pillow joins to those before, and bytes between segments, which it reads one by one."""
_SENT = Path("the picture")
"""What errors call bytes that have no file."""
_ORIENTATION_TAG = 0x0112
_SUBFILE_TAG = 0x00FE
_BANDS_TAG = 0x0115
_ARRAY = "store it as a .npy array of uint8 (height, width, channels), and set `channels`"
_BESIDE = 0b101
"""Bits of a TIFF page's kind: a smaller copy of another page, as maps have them for overviews, or its transparency."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes a picture of that EXIF orientation upright
_DEEP = (";16B", ";16L", ";16N")  # endings of Pillow's raw modes of 16-bit channels, which it would cut to 8 without a word
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# What Pillow's and numpy's parsers raise on damaged bytes (fuzzed in the tests); Pillow's own `open` catches such a list too.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)
_quiet_lock = threading.Lock()


class TooManyPixelsError(DataError):
    """A picture has more pixels than are allowed."""


def read_image(path: Path | str, channels: int | None = 3, *, max_pixels: int = MAX_PIXELS, mapped: bool = False) -> UInt8:
    """The picture in a file as uint8 (H, W, C), turned upright as its EXIF orientation says.

    Reads PNG, JPEG, WebP, TIFF and BMP of 8 bits a channel, and `.npy` arrays (H, W) or (H, W, 1-16) of uint8.
    `channels` 3 makes RGB (grey is repeated, alpha dropped), 1 makes grey; None keeps what the file has. A `.npy` file
    is never converted: its channels must be those asked for. Costs one decode and one copy. `mapped`: a `.npy` file is not
    copied but given as it lies in the file, read-only, and read where it is looked at: larger than memory if need be.

    Raises DataError: missing, empty, damaged or truncated file, another format, several pages or frames, more than `max_pixels`
    pixels, 16-bit pixels (which would be cut to 8 bits silently), channels that cannot be made.
    """
    path = Path(path)
    with _opened(path) as (stream, head):
        if head.startswith(_NPY):
            image_HWC = _npy_image(path, stream, max_pixels)
            if channels not in (None, image_HWC.shape[2]):
                raise DataError(f"{path} has {image_HWC.shape[2]} channels, {channels} are wanted: set `channels` to what the files hold")
            return image_HWC if mapped else np.array(image_HWC, order="C", subok=False)
        with _picture(path, stream, head, max_pixels) as picture:
            mode = _target_mode(path, picture, channels)
            image_HWC = np.array(_converted(_upright(picture), mode), dtype=np.uint8)
    return image_HWC if image_HWC.ndim == 3 else image_HWC[:, :, None]


def decode_image(content: bytes, channels: int | None = 3, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """The picture in the bytes of a PNG, JPEG or WebP file, as `read_image` gives it. Raises DataError as that does.

    The size is checked in the header, before anything is decoded: a small file that would unpack into a huge picture costs nothing. So
    are a JPEG's scans: more than `MAX_SCANS` are a DataError.
    """
    with _sent(content, max_pixels) as picture:
        mode = _target_mode(_SENT, picture, channels)
        image_HWC = np.array(_converted(_upright(picture), mode), dtype=np.uint8)
    return image_HWC if image_HWC.ndim == 3 else image_HWC[:, :, None]


def pixel_count(content: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Height times width of what `decode_image` would give, from the header alone. Raises DataError for what is wrong there."""
    with _sent(content, max_pixels) as picture:
        return prod(picture.size)


def encode_png(image: npt.NDArray[Any], colors: Sequence[tuple[int, int, int]] = ()) -> bytes:
    """A PNG file of (H, W) or (H, W, 1, 3 or 4) uint8.

    `colors`: makes labels (H, W) a palette picture: their numbers stay, a person sees them in colours, and those beyond are black.
    """
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image))
    if colors:
        picture.putpalette([value for color in colors for value in color])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def read_mask(path: Path | str, *, colors: bool = False, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """The labels in a file: integers (H, W), or colours (H, W, 3) uint8 where the file holds colours.

    Palette pictures give their indices, grey ones their values (2- and 4-bit grey the stored values, 16-bit uint16), one-bit
    ones 0 and 1; RGB gives colours, and alpha is dropped. `.npy` gives (H, W) of any integer type, or (H, W, 3) of uint8. With
    `colors` palettes and grey values are looked up too, so that the answer is always (H, W, 3).

    Raises DataError as `read_image` does.
    """
    path = Path(path)
    with _opened(path) as (stream, head):
        if head.startswith(_NPY):
            mask = _npy_mask(path, stream, max_pixels)
        else:
            with _picture(path, stream, head, max_pixels) as picture:
                mask = _mask_of(path, picture, colors)
    if colors and mask.ndim == 2:
        if mask.dtype != np.uint8:
            raise DataError(f"{path} holds {mask.dtype} values, which are no colours: give each class an integer `value`")
        return np.repeat(mask[:, :, None], 3, axis=2)
    return mask


def image_size(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the picture in a file, upright, from its header alone: well under a millisecond. Raises DataError.

    A PNG that seems to name its orientation behind its pixels, as few do, is decoded.
    """
    path = Path(path)
    with _opened(path) as (stream, head):
        if head.startswith(_NPY):
            shape = _npy_mapped(path, stream, max_pixels).shape
            return int(shape[0]), int(shape[1])
        with _picture(path, stream, head, max_pixels) as picture:
            if isinstance(picture, PngImagePlugin.PngImageFile) and _has_late_exif(stream):
                width, height = _upright(picture).size
                return height, width
            width, height = _stored_size(picture)
            return (width, height) if _orientation(picture) >= 5 else (height, width)


def write_image(path: Path | str, image: npt.NDArray[Any]) -> None:
    """Writes (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 in the format of the suffix; `.npy` takes any array.

    Whole or not at all: an existing file is replaced in one step, and nothing is left behind when the disk is full.
    Raises DataError: unknown suffix, a shape or type the format cannot hold, a folder that is missing or not writable.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise DataError(f"cannot write {path}: the suffix must be one of {', '.join(IMAGE_SUFFIXES)}")
    buffer = io.BytesIO()
    if suffix == ".npy":
        if image.dtype.hasobject:
            raise DataError(f"cannot write {image.dtype} to {path}: numbers only")
        np.save(buffer, image, allow_pickle=False)
    else:
        pixels = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if pixels.dtype != np.uint8 or pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
            raise DataError(f"cannot write {image.dtype} of shape {image.shape} to {path}: uint8 with 1, 3 or 4 channels, or a .npy file")
        # A low zlib level: level 6 takes three times as long for 10 % on photographs.
        options: dict[str, Any] = {"compress_level": 3} if suffix == ".png" else {"quality": 92} if suffix in (".jpg", ".jpeg") else {}
        try:
            Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=Image.registered_extensions()[suffix], **options)
        except (OSError, ValueError) as error:  # JPEG has no alpha; WebP ends at 16383 pixels a side
            raise DataError(f"cannot write {image.shape} to {path}: {_reason(error)}; choose .png or another size") from error
    write_whole(path, buffer.getbuffer())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all. Raises DataError when the system refuses."""
    try:
        write_files(path.parent, {path.name: content})
    except OSError as error:
        advice = "its folder does not exist" if not path.parent.is_dir() else _reason(error)
        raise DataError(f"cannot write {path}: {advice}; make room or choose another place") from error


def to_rgb(image_HWC: UInt8) -> UInt8:
    """(H, W, 3) for the eye from any number of channels: one or two are shown grey, of more the first three."""
    return np.repeat(image_HWC[:, :, :1], 3, axis=2) if image_HWC.shape[2] < 3 else image_HWC[:, :, :3]


def middle_square(image_HWC: UInt8, side: int) -> UInt8:
    """The largest square in the middle, resized to `side` pixels: bilinear, antialiased where it shrinks. (H, W, C) to (side, side, C)."""
    height, width = image_HWC.shape[:2]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    square = image_HWC[top : top + length, left : left + length]
    if length == side:
        return np.ascontiguousarray(square)
    planes = (Image.fromarray(np.ascontiguousarray(square[:, :, c])) for c in range(square.shape[2]))
    return np.stack([np.asarray(plane.resize((side, side), Image.Resampling.BILINEAR)) for plane in planes], axis=2)


def colorize(labels_HW: npt.NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
    """Labels (H, W) painted in the classes' colours: (H, W, 3). 255, ignored, is black. Raises DataError for a label of no class."""
    labels = np.asarray(labels_HW)
    known = (labels >= 0) & ((labels < len(classes)) | (labels == IGNORED))
    if not known.all():
        raise DataError(f"label {labels[~known].ravel()[0]} has no class: there are {len(classes)} classes, numbered from 0")
    table = np.full((256, 3), IGNORED_COLOR, dtype=np.uint8)
    if classes:
        table[: len(classes)] = [entry.color for entry in classes]
    painted: UInt8 = table[labels]
    return painted


def overlay(image_HWC: UInt8, labels_HW: npt.NDArray[Any], classes: Sequence[ClassInfo], opacity: float = 0.5) -> UInt8:
    """The labels' colours laid over the picture: (H, W, 3). `opacity` 0 shows the picture, 1 the colours; ignored pixels stay as they are.

    Raises DataError: sizes differ, opacity outside 0-1, a label of no class.
    """
    if image_HWC.shape[:2] != np.shape(labels_HW):
        raise DataError(f"the image is {image_HWC.shape[:2]} and its labels {np.shape(labels_HW)} (height, width): they must be equal")
    if not 0 <= opacity <= 1:
        raise DataError(f"opacity {opacity}: from 0 (picture) to 1 (labels)")
    base = np.ascontiguousarray(to_rgb(image_HWC))
    blended = np.array(Image.blend(Image.fromarray(base), Image.fromarray(colorize(labels_HW, classes)), opacity))
    ignored = np.asarray(labels_HW) == IGNORED
    blended[ignored] = base[ignored]
    return blended


# ---- opening ----


WRONG, RIGHT, UNKNOWN = (214, 40, 57), (226, 232, 236), (120, 120, 120)


def difference(labels_HW: npt.NDArray[Any], truth_HW: UInt8) -> UInt8:
    """RGB `(H, W, 3)`: red where a label is wrong, pale where it is right, grey where the truth is ignored."""
    picture = np.empty((*truth_HW.shape, 3), np.uint8)
    picture[...] = RIGHT
    picture[labels_HW != truth_HW] = WRONG
    picture[truth_HW == IGNORED] = UNKNOWN
    return picture


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bytes]]:
    """The file and its first bytes."""
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: name an image file ({', '.join(IMAGE_SUFFIXES)})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {_reason(error)}") from error
    with stream:
        try:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {_reason(error)}") from error
        if not head:
            raise DataError(f"{path} is empty (0 bytes): replace it or remove it")
        yield stream, head


@contextmanager
def _sent(content: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """As `_picture`, of bytes in one of the formats that may be sent."""
    head = content[:_HEAD_BYTES]
    if _decoder(head) not in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile):
        raise DataError(f"{len(content):,} bytes that are no PNG, JPEG or WebP picture: send the bytes of such a file")
    if head.startswith(b"\xff\xd8\xff") and (marks := content.count(_SCAN)) > MAX_SCANS and _has_scans(content, MAX_SCANS + 1):
        raise DataError(f"{_SENT} has {marks:,} scans, more than the limit of {MAX_SCANS}: store it anew")
    if head.startswith(b"\xff\xd8\xff"):
        parts_fit = content.count(b"Exif\0\0") <= _MAX_EXIF and _segments_fit(content)
    else:
        parts_fit = not head.startswith(b"\x89PNG") or _chunks_fit(content)
    if not parts_fit:
        raise DataError(f"{_SENT} has more metadata than a picture has ({MAX_PARTS} parts are taken): store it anew, without")
    with _picture(_SENT, io.BytesIO(content), head, max_pixels) as picture:
        yield picture


def _has_scans(content: bytes, wanted: int) -> bool:
    """Whether a JPEG has so many scans. The same two bytes in its metadata, and in what follows its end, are none."""
    place, found = 2, 0
    while (mark := _MARKER.search(content, place)) and mark.group() != b"\xff\xd9":
        place = mark.end()
        found += mark.group() == _SCAN
        if found == wanted:
            return True
        place += int.from_bytes(content[place : place + 2], "big")
    return False


def _segments_fit(content: bytes) -> bool:
    """Whether a JPEG has no more than `MAX_PARTS` segments before its first scan, and hardly a byte that is none of theirs. It is read as
    Pillow reads it."""
    place, parts, junk = 2, 0, 0
    while (at := content.find(b"\xff", place)) >= 0 and at + 1 < len(content):
        junk += at - place
        kind = content[at + 1]
        place = at + 2
        if kind in (0x00, 0xFF):
            place -= kind == 0xFF
            junk += 1
        else:
            if kind == 0xDA:
                return True
            parts += 1
            if not (0xD0 <= kind <= 0xD9 or 0xF0 <= kind <= 0xFD or kind == 0xC8):  # these stand alone
                place += int.from_bytes(content[place : place + 2], "big")
        if parts > MAX_PARTS or junk > _MAX_JUNK:
            return False
    return len(content) - place <= _MAX_JUNK  # without a scan


def _chunks_fit(content: bytes) -> bool:
    """Whether a PNG has no more than `MAX_PARTS` chunks beside those of its pixels, and these are not tiny ones without number."""
    place, parts, pixels = len(b"\x89PNG\r\n\x1a\n"), 0, 0
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            pixels += 1
        else:
            parts += 1
        if parts > MAX_PARTS or pixels > MAX_PARTS + len(content) // 256:
            return False
        if kind == b"IEND":
            break
        place += 12 + length
    return True


@contextmanager
def _picture(path: Path, stream: IO[bytes], head: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """The decoder of a file, header read and size checked; damage found in the header or later is a DataError."""
    decoder = _decoder(head)
    if decoder is None:
        raise DataError(f"{path} is no image that muntin reads: PNG, JPEG, WebP, TIFF, BMP or .npy; convert it or remove it")
    try:
        with _quiet(max_pixels):
            picture = decoder(stream)
        with picture:
            _check_pixels(path, picture.size, max_pixels)
            _check_alone(path, picture)
            _check_bands(path, picture)
            yield picture
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"{path} has more pixels than the limit of {max_pixels:,}: cut it into smaller pictures") from error
    except _DAMAGE as error:
        if isinstance(error, SyntaxError) and "unknown pixel mode" in str(error):  # Pillow's words for a TIFF that may well be sound
            raise DataError(f"{path} has channels of a number or kind that is not read from TIFF: {_ARRAY}") from error
        raise _damaged(path, error) from error


def _decoder(head: bytes) -> Callable[[IO[bytes]], ImageFile.ImageFile] | None:
    decoders: tuple[tuple[bytes, bytes, Callable[[IO[bytes]], ImageFile.ImageFile]], ...] = (
        (b"\x89PNG\r\n\x1a\n", b"", PngImagePlugin.PngImageFile),
        (b"\xff\xd8\xff", b"", JpegImagePlugin.JpegImageFile),
        (b"RIFF", b"WEBP", WebPImagePlugin.WebPImageFile),
        (b"II*\x00", b"", TiffImagePlugin.TiffImageFile),
        (b"MM\x00*", b"", TiffImagePlugin.TiffImageFile),
        (b"II+\x00", b"", TiffImagePlugin.TiffImageFile),
        (b"MM\x00+", b"", TiffImagePlugin.TiffImageFile),
        (b"BM", b"", BmpImagePlugin.BmpImageFile),
    )
    return next((decoder for first, ninth, decoder in decoders if head.startswith(first) and head[8:].startswith(ninth)), None)


@contextmanager
def _quiet(max_pixels: int = 0) -> Iterator[None]:
    """Pillow and numpy warn about odd headers that change no pixel. The lock is there because warning filters are process-wide.

    So is Pillow's limit of a TIFF and a WebP picture, which is `max_pixels` inside the block, if that is more.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if limit is None else max(limit, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height == 0:
        raise DataError(f"{path} has no pixels ({width}×{height}): replace it or remove it")
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{path} has {width}×{height} pixels, more than the limit of {max_pixels:,}: cut it into smaller pictures")


def _check_alone(path: Path, picture: ImageFile.ImageFile) -> None:
    """Raises DataError where a file holds several pictures. A TIFF's smaller copies and transparency of its first page are no others."""
    with _quiet():
        count = getattr(picture, "n_frames", 1)
    if count > 1 and isinstance(picture, TiffImagePlugin.TiffImageFile):
        kinds = []
        with _quiet():
            for page in range(1, count):
                picture.seek(page)
                kinds.append(picture.tag_v2.get(_SUBFILE_TAG, 0))
            picture.seek(0)
        count = 1 + sum(1 for kind in kinds if not kind & _BESIDE)
    if count > 1:
        raise DataError(f"{path} holds {count} pages or frames, and one picture is wanted: store each in a file of its own")


def _check_bands(path: Path, picture: ImageFile.ImageFile) -> None:
    """Raises DataError for a TIFF of more channels than are decoded: Pillow passes over those that the file does not name."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return
    stored, decoded = picture.tag_v2.get(_BANDS_TAG, 1), len(picture.getbands())
    if stored > decoded:
        raise DataError(
            f"{path} has {stored} channels, of which {decoded} would be read: {_ARRAY} to {stored}, or store those {decoded} alone"
        )


def _damaged(path: Path, error: BaseException) -> DataError:
    if isinstance(error, MemoryError):
        return DataError(f"{path} needs more memory than there is, unless its header lies: cut it into smaller pictures or replace it")
    return DataError(f"{path} is damaged or truncated ({_reason(error)}): replace it or remove it")


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# ---- pictures ----


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) as it lies in the file: of a TIFF, Pillow's `size` may be the upright one already."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return picture.tag_v2[TiffImagePlugin.IMAGEWIDTH], picture.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return picture.size


def _orientation(picture: Image.Image) -> int:
    """By what has been read of the file so far: a PNG's own `getexif` would decode it, to look behind its pixels."""
    try:
        with _quiet():
            value = Image.Image.getexif(picture).get(_ORIENTATION_TAG, 1)
    except _DAMAGE:  # the picture itself may be sound: whether Pillow meets this by itself hangs on other tags
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_late_exif(stream: IO[bytes]) -> bool:
    """Whether the end of a PNG has the letters that EXIF begins with. Leaves the stream where it was."""
    place = stream.tell()
    stream.seek(max(place, stream.seek(0, io.SEEK_END) - _TAIL_BYTES))
    found = b"eXIf" in stream.read()
    stream.seek(place)
    return found


def _upright(picture: ImageFile.ImageFile) -> Image.Image:
    """The picture decoded, which takes no lock, and turned as its EXIF orientation says."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # the one that Pillow holds against its own limit here
        with _quiet(prod(picture.size)):
            picture.load_prepare()
    picture.load()
    turn = _TURNS.get(_orientation(picture))  # 1 for a TIFF, which Pillow has turned by now
    return picture if turn is None else picture.transpose(turn)


def _target_mode(path: Path, picture: ImageFile.ImageFile, channels: int | None) -> str:
    """The Pillow mode to convert to; refuses what would invent or cut values."""
    mode = picture.mode
    if mode.startswith(("I", "F")) or _is_deep(picture):
        raise DataError(f"{path} has more than 8 bits a channel (mode {mode}): scale it to 8 bits first")
    held = {"1": 1, "L": 1, "P": 3, "LA": 2, "RGBA": 4, "RGBa": 4, "La": 2, "PA": 4}.get(mode, 3)
    if mode == "P" and "transparency" in picture.info:
        held = 4
    wanted = held if channels is None else channels
    if wanted not in _MODES or (wanted in (2, 4) and wanted != held):
        if path is _SENT:
            raise DataError(f"{path} has {held} channels, and the model takes {wanted}: send them as a tensor (/v2/models/NAME/infer)")
        raise DataError(f"{path} has {held} channels, {wanted} are wanted: set `channels` to {held}, or store the pictures as .npy arrays")
    return _MODES[wanted]


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode in ("P", "PA"):  # palettes may carry alpha: through RGBA it is dropped knowingly, without Pillow's warning
        picture = picture.convert("RGBA")
    return picture if picture.mode == mode else picture.convert(mode)


def _mask_of(path: Path, picture: ImageFile.ImageFile, colors: bool) -> npt.NDArray[Any]:
    mode = picture.mode
    if mode == "1":
        return np.array(_upright(picture)).astype(np.uint8) * np.uint8(255 if colors else 1)
    if mode == "L" or (mode == "P" and not colors):
        # Pillow spreads 2- and 4-bit grey over 0-255; the file's own numbers are the labels.
        step = {"L;2": 85, "L;4": 17}.get(_raw_mode(picture), 1) if not colors else 1
        values = np.array(_upright(picture))
        return values if step == 1 else values // np.uint8(step)
    if mode == "LA":
        return np.array(_upright(picture).convert("L"))
    if mode.startswith("I"):
        return np.array(_upright(picture))
    if mode == "F" or _is_deep(picture):
        raise DataError(f"{path} holds real numbers or 16-bit colours: masks are integers or colours of 8 bits")
    return np.array(_converted(_upright(picture), "RGB"))


def _is_deep(picture: ImageFile.ImageFile) -> bool:
    """Whether a channel has more than 8 bits, which Pillow would cut, or take for two pixels, without a word."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # of one whose planes lie apart the raw mode does not tell
        return bool(max(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8)
    return _raw_mode(picture).endswith(_DEEP)


def _raw_mode(picture: ImageFile.ImageFile) -> str:
    """How the file stores its pixels, known before they are decoded."""
    arguments = picture.tile[0][3] if picture.tile else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


# ---- arrays ----


def _npy_mapped(path: Path, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
    """The array as it lies in the file, unread: a lying header costs nothing. Pickled objects are refused."""
    try:
        with _quiet():
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(stream)
        if dtype.hasobject or len(shape) not in (2, 3):
            raise DataError(f"{path} holds {dtype} of shape {shape}: an image is (H, W) or (H, W, channels) of integers")
        _check_pixels(path, (shape[1], shape[0]), max_pixels)
        array = np.memmap(stream, dtype=dtype, shape=shape, mode="r", offset=stream.tell(), order="F" if fortran else "C")
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return array


def _npy_image(path: Path, stream: IO[bytes], max_pixels: int) -> UInt8:
    array = _npy_mapped(path, stream, max_pixels)
    if array.dtype != np.uint8 or (array.ndim == 3 and not 1 <= array.shape[2] <= MAX_CHANNELS):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: (H, W) or (H, W, 1-{MAX_CHANNELS}) of uint8 is wanted")
    return array if array.ndim == 3 else array[:, :, None]


def _npy_mask(path: Path, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
    array = _npy_mapped(path, stream, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    colors = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (colors or (array.ndim == 2 and array.dtype.kind in "bui")):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: a mask is (H, W) of integers or (H, W, 3) of uint8")
    mask = np.array(array, order="C", subok=False)
    return mask.astype(np.uint8) if mask.dtype == np.bool_ else mask
