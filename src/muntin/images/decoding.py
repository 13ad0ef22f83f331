"""Pictures and masks read from files, and pictures from bytes."""

from __future__ import annotations

import io
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from muntin.errors import DataError
from muntin.images.client_pictures import opened_bytes
from muntin.images.opening import (
    DAMAGE,
    MAX_PIXELS,
    NPY_HEAD,
    SENT,
    PictureFile,
    UInt8,
    map_array,
    map_image,
    opened_file,
    opened_picture,
    quiet_pillow,
    read_mask_array,
)

_TAIL_BYTES = 1 << 17
"""End of a PNG that may hold EXIF after the pixels: EXIF has 64 KiB at most, and other chunks may follow."""
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_DEEP_ENDINGS = (";16B", ";16L", ";16N")
"""Endings of Pillow's raw modes of 16-bit channels, which it would cut to 8 bits silently."""
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def read_image(path: PictureFile | str, channels: int | None = 3, *, max_pixels: int = MAX_PIXELS, mapped: bool = False) -> UInt8:
    """Reads a picture as uint8 (H, W, C), turned upright as its EXIF orientation says.

    Reads PNG, JPEG, WebP, TIFF and BMP of 8 bits a channel, and `.npy` arrays (H, W) or (H, W, 1-16) of uint8.
    `channels` 3 makes RGB (grey is repeated, alpha dropped), 1 makes grey; None keeps what the file has. A `.npy` file
    is never converted: its channels must be those asked for. Costs one decode and one copy. `mapped`: a `.npy` file is
    mapped read-only instead of copied, so that it may be larger than memory.

    Raises DataError: missing, empty, damaged or cut off file, another format, several pages or frames, more than `max_pixels`
    pixels, 16-bit pixels (which would be cut to 8 bits silently), channels that cannot be made.
    """
    path = Path(path) if isinstance(path, str) else path
    with opened_file(path) as (stream, head):
        if head.startswith(NPY_HEAD):
            image_HWC = map_image(path, stream, max_pixels)
            if channels not in (None, image_HWC.shape[2]):
                raise DataError(f"{path} has {image_HWC.shape[2]} channels, {channels} are wanted: set `channels` to what the files hold")
            return image_HWC if mapped else np.array(image_HWC, order="C", subok=False)
        with opened_picture(path, stream, head, max_pixels) as picture:
            return _decoded(path, picture, channels)


def decode_image(content: bytes, channels: int | None = 3, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Decodes the bytes of a PNG, JPEG, WebP, TIFF or BMP file, as `read_image` does. Raises DataError.

    Size, scans and metadata are checked before anything is decoded, so a small file that would unpack into a huge picture costs nothing.
    """
    with opened_bytes(content, max_pixels) as picture:
        return _decoded(SENT, picture, channels)


def pillow_pixels(picture: Image.Image, channels: int | None = 3) -> UInt8:
    """Return the pixels of an image of Pillow, as `read_image` returns those of its file. Raises DataError."""
    return _decoded(Path("the image"), picture, channels)


def pixel_count(content: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Height times width of the picture that `decode_image` would return, from the header alone. Raises DataError."""
    with opened_bytes(content, max_pixels) as picture:
        return prod(picture.size)


def image_size(path: PictureFile | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright picture in a file, from its header: well under a millisecond. Raises DataError.

    A PNG that may name its orientation after its pixels is decoded; such files are rare.
    """
    path = Path(path) if isinstance(path, str) else path
    with opened_file(path) as (stream, head):
        if head.startswith(NPY_HEAD):
            shape = map_array(path, stream, max_pixels).shape
            return int(shape[0]), int(shape[1])
        with opened_picture(path, stream, head, max_pixels) as picture:
            if isinstance(picture, PngImagePlugin.PngImageFile) and _has_late_exif(stream):
                width, height = _upright(picture).size
                return height, width
            width, height = _stored_size(picture)
            return (width, height) if _orientation(picture) >= 5 else (height, width)


def read_mask(path: PictureFile | str, *, colors: bool = False, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """Reads labels: integers (H, W), or colours (H, W, 3) uint8 where the file holds colours.

    Palette pictures give their indices, grey ones their values (2- and 4-bit grey the stored values, 16-bit uint16), one-bit
    ones 0 and 1; RGB gives colours, and alpha is dropped. `.npy` gives (H, W) of any integer type, or (H, W, 3) of uint8. With
    `colors` palettes and grey values are looked up too, so that the result is always (H, W, 3).

    Raises DataError as `read_image` does.
    """
    path = Path(path) if isinstance(path, str) else path
    with opened_file(path) as (stream, head):
        if head.startswith(NPY_HEAD):
            mask = read_mask_array(path, stream, max_pixels)
        else:
            with opened_picture(path, stream, head, max_pixels) as picture:
                mask = _mask_of(path, picture, colors)
    if colors and mask.ndim == 2:
        if mask.dtype != np.uint8:
            raise DataError(f"{path} holds {mask.dtype} values, which are no colours: give each class an integer `value`")
        return np.repeat(mask[:, :, None], 3, axis=2)
    return mask


def _decoded(path: PictureFile, picture: Image.Image, channels: int | None) -> UInt8:
    mode = _target_mode(path, picture, channels)
    image_HWC = np.array(_converted(_upright(picture), mode), dtype=np.uint8)
    return image_HWC if image_HWC.ndim == 3 else image_HWC[:, :, None]


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) as stored in the file: Pillow's `size` of a TIFF may be the upright one already."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return picture.tag_v2[TiffImagePlugin.IMAGEWIDTH], picture.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return picture.size


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation in what was read of the file so far; a PNG's own `getexif` would decode the picture first."""
    try:
        with quiet_pillow():
            value = Image.Image.getexif(picture).get(_ORIENTATION_TAG, 1)
    except DAMAGE:  # the pixels may be sound
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_late_exif(stream: IO[bytes]) -> bool:
    """Returns True if the end of a PNG holds the name of the EXIF chunk. The stream's position is kept."""
    position = stream.tell()
    stream.seek(max(position, stream.seek(0, io.SEEK_END) - _TAIL_BYTES))
    has_name = b"eXIf" in stream.read()
    stream.seek(position)
    return has_name


def _upright(picture: Image.Image) -> Image.Image:
    """Decodes a picture, without a lock, and turns it as its EXIF orientation says."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # the only decoder that checks Pillow's own limit here
        with quiet_pillow(prod(picture.size)):
            picture.load_prepare()
            picture.getexif()  # kept; `load` would read it with warnings about damaged tags
    picture.load()
    transposition = _TRANSPOSITIONS.get(_orientation(picture))  # none for a TIFF, which Pillow has turned by now
    return picture if transposition is None else picture.transpose(transposition)


def _target_mode(path: PictureFile, picture: Image.Image, channels: int | None) -> str:
    """The Pillow mode to convert to. Raises DataError where values would be invented or cut."""
    mode = picture.mode
    if mode.startswith(("I", "F")) or _is_deep(picture):
        raise DataError(f"{path} has more than 8 bits a channel (mode {mode}): scale it to 8 bits first")
    stored = {"1": 1, "L": 1, "P": 3, "LA": 2, "RGBA": 4, "RGBa": 4, "La": 2, "PA": 4}.get(mode, 3)
    if mode == "P" and "transparency" in picture.info:
        stored = 4
    target = stored if channels is None else channels
    if target not in _MODES or (target in (2, 4) and target != stored):
        if path is SENT:
            raise DataError(f"{path} has {stored} channels, and the model takes {target}: send them as a tensor (/v2/models/NAME/infer)")
        raise DataError(
            f"{path} has {stored} channels, {target} are wanted: set `channels` to {stored}, or store the pictures as .npy arrays"
        )
    return _MODES[target]


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in another mode."""
    if picture.mode == mode:
        return picture
    if picture.mode in ("P", "PA"):  # a palette may carry alpha: by way of RGBA it is dropped without Pillow's warning
        picture = picture.convert("RGBA")
    return picture if picture.mode == mode else picture.convert(mode)


def _is_deep(picture: Image.Image) -> bool:
    """Returns True for more than 8 bits a channel, which Pillow would cut, or read as two pixels, silently."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # the raw mode of separate planes does not tell
        return bool(max(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8)
    return _raw_mode(picture).endswith(_DEEP_ENDINGS)


def _raw_mode(picture: Image.Image) -> str:
    """Pillow's name of the stored pixel format; known before decoding."""
    arguments = picture.tile[0][3] if isinstance(picture, ImageFile.ImageFile) and picture.tile else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _mask_of(path: PictureFile, picture: ImageFile.ImageFile, colors: bool) -> npt.NDArray[Any]:
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
