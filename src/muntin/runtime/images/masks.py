"""Masks read from files: class numbers or colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFile

from muntin.errors import DataError
from muntin.runtime.images.arrays import NPY_HEAD, read_mask_array
from muntin.runtime.images.files import MAX_PIXELS, opened_file, opened_picture
from muntin.runtime.images.pictures import converted, is_deep, raw_mode, upright


def read_mask(path: Path | str, *, colors: bool = False, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """Reads labels: integers (H, W), or colours (H, W, 3) uint8 where the file holds colours.

    Palette pictures give their indices, grey ones their values (2- and 4-bit grey the stored values, 16-bit uint16), one-bit
    ones 0 and 1; RGB gives colours, and alpha is dropped. `.npy` gives (H, W) of any integer type, or (H, W, 3) of uint8. With
    `colors` palettes and grey values are looked up too, so that the result is always (H, W, 3).

    Raises DataError as `read_image` does.
    """
    path = Path(path)
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


def _mask_of(path: Path, picture: ImageFile.ImageFile, colors: bool) -> npt.NDArray[Any]:
    mode = picture.mode
    if mode == "1":
        return np.array(upright(picture)).astype(np.uint8) * np.uint8(255 if colors else 1)
    if mode == "L" or (mode == "P" and not colors):
        # Pillow spreads 2- and 4-bit grey over 0-255; the file's own numbers are the labels.
        step = {"L;2": 85, "L;4": 17}.get(raw_mode(picture), 1) if not colors else 1
        values = np.array(upright(picture))
        return values if step == 1 else values // np.uint8(step)
    if mode == "LA":
        return np.array(upright(picture).convert("L"))
    if mode.startswith("I"):
        return np.array(upright(picture))
    if mode == "F" or is_deep(picture):
        raise DataError(f"{path} holds real numbers or 16-bit colours: masks are integers or colours of 8 bits")
    return np.array(converted(upright(picture), "RGB"))
