"""Images and masks in `.npy` files. They are mapped, not read, and pickled objects are refused."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from muntin.errors import DataError
from muntin.runtime.images.files import DAMAGE, UInt8, check_pixels, damaged, quiet_pillow

NPY_HEAD = b"\x93NUMPY"
MAX_CHANNELS = 16


def map_array(path: Path, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
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


def map_image(path: Path, stream: IO[bytes], max_pixels: int) -> UInt8:
    """The image (H, W, C) in a file, mapped read-only. Raises DataError for another type or number of channels."""
    array = map_array(path, stream, max_pixels)
    if array.dtype != np.uint8 or (array.ndim == 3 and not 1 <= array.shape[2] <= MAX_CHANNELS):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: (H, W) or (H, W, 1-{MAX_CHANNELS}) of uint8 is wanted")
    return array if array.ndim == 3 else array[:, :, None]


def read_mask_array(path: Path, stream: IO[bytes], max_pixels: int) -> npt.NDArray[Any]:
    """The mask in a file: (H, W) of integers or (H, W, 3) of uint8. Raises DataError for anything else."""
    array = map_array(path, stream, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    colors = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (colors or (array.ndim == 2 and array.dtype.kind in "bui")):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: a mask is (H, W) of integers or (H, W, 3) of uint8")
    mask = np.array(array, order="C", subok=False)
    return mask.astype(np.uint8) if mask.dtype == np.bool_ else mask
