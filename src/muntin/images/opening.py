"""Image files: recognised by their first bytes, opened by Pillow's decoder of that format, and checked before they are decoded.

`PIL.Image.open` and Pillow's decoders of TIFF and WebP apply a process-wide limit of pixels. Here the limit is an argument
(`MAX_PIXELS` by default): the decoders are called directly, and Pillow's limit is raised to it while a header is read.
WebP itself ends at 16383 pixels a side. `.npy` arrays are mapped, not read. Every failure is a one-line DataError that names the file.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from muntin.errors import DataError
from muntin.images.packed import PackedFile

UInt8 = npt.NDArray[np.uint8]
Decoder = Callable[[IO[bytes]], ImageFile.ImageFile]
PictureFile = Path | PackedFile

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".npy")
SENT = Path("the picture")
"""Stands for a file's path in errors about bytes that a client sent."""
MAX_PIXELS = 1 << 28
"""Default limit of a picture's pixels: 16384 x 16384, 0.8 GB as RGB."""
MAX_CHANNELS = 16
"""Largest number of channels of a `.npy` array."""
NPY_HEAD = b"\x93NUMPY"
HEAD_BYTES = 16
"""Bytes at the start of a file that tell its format."""
# What Pillow's and numpy's parsers raise on damaged bytes (fuzzed in the tests).
DAMAGE = (
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
_SUBFILE_TAG = 0x00FE
_BANDS_TAG = 0x0115
_DEPENDENT_PAGE = 0b101
"""Bits of a TIFF page's kind: a smaller copy of another page (maps have them as overviews), or its transparency."""
_USE_ARRAY = "store it as a .npy array of uint8 (height, width, channels), and set `channels`"
USE_TENSOR = "send it as a tensor (/v2/models/NAME/infer)"
_DECODERS: tuple[tuple[bytes, bytes, Decoder], ...] = (
    (b"\x89PNG\r\n\x1a\n", b"", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", b"", JpegImagePlugin.JpegImageFile),
    (b"RIFF", b"WEBP", WebPImagePlugin.WebPImageFile),
    (b"II*\x00", b"", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", b"", TiffImagePlugin.TiffImageFile),
    (b"II+\x00", b"", TiffImagePlugin.TiffImageFile),
    (b"MM\x00+", b"", TiffImagePlugin.TiffImageFile),
    (b"BM", b"", BmpImagePlugin.BmpImageFile),
)
"""First bytes of a file, bytes from the ninth on, and the decoder."""
_pillow_lock = threading.Lock()
"""Guards warning filters and Pillow's limit of pixels, which are process-wide."""


class TooManyPixelsError(DataError):
    """A picture has more pixels than are allowed."""


@contextmanager
def opened_file(path: PictureFile) -> Iterator[tuple[IO[bytes], bytes]]:
    """Opens a file and reads its first bytes. Raises DataError for a missing, unreadable or empty file."""
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: name an image file ({', '.join(IMAGE_SUFFIXES)})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {reason(error)}") from error
    with stream:
        try:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {reason(error)}") from error
        if not head:
            raise DataError(f"{path} is empty (0 bytes): replace it or remove it")
        yield stream, head


def decoder_of(head: bytes) -> Decoder | None:
    """Pillow's decoder for a file's first bytes; None for another format."""
    return next((decoder for first, ninth, decoder in _DECODERS if head.startswith(first) and head[8:].startswith(ninth)), None)


@contextmanager
def opened_picture(path: PictureFile, stream: IO[bytes], head: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Reads a picture's header and checks it; nothing is decoded. Damage found here or in the block is a DataError."""
    decoder = decoder_of(head)
    if decoder is None:
        raise DataError(f"{path} is no image that muntin reads: PNG, JPEG, WebP, TIFF, BMP or .npy; convert it or remove it")
    if decoder is TiffImagePlugin.TiffImageFile:
        silence_libtiff()
    try:
        with quiet_pillow(max_pixels):
            picture = decoder(stream)
        with picture:
            check_pixels(path, picture.size, max_pixels)
            _check_pages(path, picture)
            _check_bands(path, picture)
            yield picture
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"{path} has more pixels than the limit of {max_pixels:,}: cut it into smaller pictures") from error
    except DAMAGE as error:
        if isinstance(error, SyntaxError) and "unknown pixel mode" in str(error):  # Pillow says so of sound TIFF files, too
            raise DataError(
                f"{path} has channels of a number or kind that is not read from TIFF: {USE_TENSOR if path is SENT else _USE_ARRAY}"
            ) from error
        if "MAX_TEXT" in str(error):  # Pillow's limits of a PNG's texts
            texts = f"a text unpacks to more than {PngImagePlugin.MAX_TEXT_CHUNK:,} bytes, or all to {PngImagePlugin.MAX_TEXT_MEMORY:,}"
            raise DataError(f"{path} has more metadata than a picture has ({texts}): store it anew, without") from error
        raise damaged(path, error) from error


@cache
def silence_libtiff(user: str | None = None) -> bool:
    """Keeps libtiff from writing to standard error, for the whole process. Pillow still raises what stops the decoder.

    `user`: file of the library that uses this libtiff; None: Pillow's.

    A client of a server could otherwise fill a pipe that nobody reads, and stop the decoder. Returns False where the functions are not
    found, as in a Pillow that contains libtiff without its names.
    """
    try:
        library = ctypes.CDLL(user or Image.core.__file__)  # type: ignore[attr-defined]  # names of libraries that it is linked with are found, too
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
            set_handler(None)
    except (OSError, AttributeError):
        return False
    return True


@contextmanager
def quiet_pillow(max_pixels: int = 0) -> Iterator[None]:
    """Silences warnings about odd headers that change no pixel, and raises Pillow's limit of pixels to `max_pixels`."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if limit is None else max(limit, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def check_pixels(path: PictureFile, size: tuple[int, int], max_pixels: int) -> None:
    """Raises DataError unless a picture of this (width, height) has pixels, and at most `max_pixels`."""
    width, height = size
    if width * height == 0:
        raise DataError(f"{path} has no pixels ({width}×{height}): replace it or remove it")
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{path} has {width}×{height} pixels, more than the limit of {max_pixels:,}: cut it into smaller pictures")


def _check_pages(path: PictureFile, picture: ImageFile.ImageFile) -> None:
    """Raises DataError for several pictures in a file. Smaller copies and transparency of a TIFF's first page do not count."""
    with quiet_pillow():
        count = getattr(picture, "n_frames", 1)
    if count > 1 and isinstance(picture, TiffImagePlugin.TiffImageFile):
        kinds = []
        with quiet_pillow():
            for page in range(1, count):
                picture.seek(page)
                kinds.append(picture.tag_v2.get(_SUBFILE_TAG, 0))
            picture.seek(0)
        count = 1 + sum(1 for kind in kinds if not kind & _DEPENDENT_PAGE)
    if count > 1:
        raise DataError(f"{path} holds {count} pages or frames, and one picture is wanted: store each in a file of its own")


def _check_bands(path: PictureFile, picture: ImageFile.ImageFile) -> None:
    """Raises DataError for a TIFF of more channels than are decoded: Pillow skips those whose kind the file does not name."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return
    stored, decoded = picture.tag_v2.get(_BANDS_TAG, 1), len(picture.getbands())
    if stored > decoded:
        advice = USE_TENSOR if path is SENT else f"{_USE_ARRAY} to {stored}"
        raise DataError(f"{path} has {stored} channels, of which {decoded} would be read: {advice}, or store those {decoded} alone")


def damaged(path: PictureFile, error: BaseException) -> DataError:
    """The DataError for an error that a parser raised."""
    if isinstance(error, MemoryError):
        return DataError(f"{path} needs more memory than there is, unless its header lies: cut it into smaller pictures or replace it")
    cause = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""  # parsers' own words help no user
    advice = "send a whole file" if path is SENT else "replace it or remove it"
    return DataError(f"{path} is damaged or cut off{cause}: no picture can be read from it; {advice}")


def reason(error: BaseException) -> str:
    """An error's text in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def map_array(path: PictureFile, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
    """The array in a file, (H, W) or (H, W, C), mapped read-only: a false header costs no memory. Raises DataError."""
    try:
        with quiet_pillow():
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(stream)
        if dtype.hasobject or len(shape) not in (2, 3):
            raise DataError(f"{path} holds {dtype} of shape {shape}: an image is (H, W) or (H, W, channels) of integers")
        check_pixels(path, (shape[1], shape[0]), max_pixels)
        array = np.memmap(stream, dtype=dtype, shape=shape, mode="r", offset=stream.tell(), order="F" if fortran else "C")
    except DAMAGE as error:
        raise damaged(path, error) from error
    return array


def map_image(path: PictureFile, stream: IO[bytes], max_pixels: int) -> UInt8:
    """The image (H, W, C) in a file, mapped read-only. Raises DataError for another type or number of channels."""
    array = map_array(path, stream, max_pixels)
    if array.dtype != np.uint8 or (array.ndim == 3 and not 1 <= array.shape[2] <= MAX_CHANNELS):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: (H, W) or (H, W, 1-{MAX_CHANNELS}) of uint8 is wanted")
    return array if array.ndim == 3 else array[:, :, None]


def read_mask_array(path: PictureFile, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
    """The mask in a file: (H, W) of integers or (H, W, 3) of uint8. Raises DataError for anything else."""
    array = map_array(path, stream, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    colors = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (colors or (array.ndim == 2 and array.dtype.kind in "bui")):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: a mask is (H, W) of integers or (H, W, 3) of uint8")
    mask = np.array(array, order="C", subok=False)
    return mask.astype(np.uint8) if mask.dtype == np.bool_ else mask
