"""Pictures encoded and written, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from muntin.artifact.atomic_files import write_files
from muntin.errors import DataError
from muntin.images.opening import IMAGE_SUFFIXES, reason

_PNG_LEVEL = 3
"""zlib level: level 6 takes three times as long for 10 % on photographs."""


def encode_png(image: npt.NDArray[Any], colors: Sequence[tuple[int, int, int]] = ()) -> bytes:
    """Encodes (H, W) or (H, W, 1, 3 or 4) uint8, or (H, W) uint16, as a PNG file.

    `colors`: makes labels (H, W) a palette picture: the file holds the labels, viewers show the colours, and black for further labels.
    """
    picture = Image.fromarray(_without_single_channel(image))
    if colors:
        picture.putpalette([value for color in colors for value in color])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def write_image(path: Path | str, image: npt.NDArray[Any]) -> None:
    """Writes (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 in the format of the suffix; `.npy` takes any array.

    An existing file is replaced in one step, and nothing is left behind when the disk is full.
    Raises DataError: unknown suffix, a shape or type the format cannot hold, a folder that is missing or not writable.
    """
    path = Path(path)
    write_whole(path, encode_image(path, image))


def encode_image(path: Path, image: npt.NDArray[Any]) -> memoryview:
    """The content of a file that `write_image` writes. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise DataError(f"cannot write {path}: the suffix must be one of {', '.join(IMAGE_SUFFIXES)}")
    buffer = io.BytesIO()
    if suffix == ".npy":
        if image.dtype.hasobject:
            raise DataError(f"cannot write {image.dtype} to {path}: numbers only")
        np.save(buffer, image, allow_pickle=False)
    else:
        pixels = _without_single_channel(image)
        if pixels.dtype != np.uint8 or pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
            raise DataError(f"cannot write {image.dtype} of shape {image.shape} to {path}: uint8 with 1, 3 or 4 channels, or a .npy file")
        options: dict[str, Any] = {"compress_level": _PNG_LEVEL} if suffix == ".png" else {}
        if suffix in (".jpg", ".jpeg"):
            options = {"quality": 92}
        try:
            Image.fromarray(pixels).save(buffer, format=Image.registered_extensions()[suffix], **options)
        except (OSError, ValueError) as error:  # JPEG has no alpha; WebP ends at 16383 pixels a side
            raise DataError(f"cannot write {image.shape} to {path}: {reason(error)}; choose .png or another size") from error
    return buffer.getbuffer()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all. Raises DataError when the system refuses."""
    try:
        write_files(path.parent, {path.name: content})
    except OSError as error:
        advice = "its folder does not exist" if not path.parent.is_dir() else reason(error)
        raise DataError(f"cannot write {path}: {advice}; make room or choose another place") from error


def _without_single_channel(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
