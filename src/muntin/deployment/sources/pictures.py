"""Pictures of a folder as batches for the calibration.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact.answers import ANSWERS, Task
from muntin.deployment.sizes.requested import Size
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES, middle_part, read_image
from muntin.images.listing import images_in
from muntin.images.opening import UInt8

_BATCH = 8


def calibration_pictures(folder: Path, *, channels: int, size: Size, task: Task, largest_count: int) -> list[Tensor]:
    """Read batches (B, C, H, W) of raw pixels, float 0-255.

    Reads the images in `folder` and its subfolders (`images_in`). Of more than `largest_count` it takes as many at equal distances in the
    order of their names. For a task with one answer a picture it is cut to the middle with the
    proportions of `size`, and resized, as `muntin predict` does. Otherwise it is cut to the middle of that size, without resizing unless
    it is smaller.
    Raises `DataError` for a folder without pictures, and for one that cannot be read.
    """
    paths, _ = list_pictures(folder)
    count = min(len(paths), largest_count)
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    images = torch.from_numpy(np.stack([_part(read_image(path, channels), size, task) for path in chosen]))
    return [batch_BHWC.permute(0, 3, 1, 2).float().contiguous() for batch_BHWC in torch.split(images, _BATCH)]


def list_pictures(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """List the images for a calibration, and notes on what was left out (`images_in`). Raises `DataError` if there are none."""
    if not folder.is_dir():
        raise DataError(f"calibration {folder}: {'is a file' if folder.exists() else 'does not exist'}: give a folder of pictures")
    paths, notes = images_in(folder)
    if not paths:
        raise DataError(
            f"calibration {folder}: has no pictures ({', '.join(IMAGE_SUFFIXES)}), nor have its folders: give a folder of pictures"
        )
    return paths, notes


def _part(image_HWC: UInt8, size: Size, task: Task) -> UInt8:
    height, width = size
    H, W = image_HWC.shape[:2]
    if ANSWERS[task].one or height > H or width > W:
        return middle_part(image_HWC, height, width)
    top, left = (H - height) // 2, (W - width) // 2
    return np.ascontiguousarray(image_HWC[top : top + height, left : left + width])


def generated_pictures(channels: int, size: Size) -> Tensor:
    """Return two smooth pictures (2, C, H, W) of raw pixels, the same for each call: they stand in where no pictures are needed."""
    coarse = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, size, mode="bilinear") * 255).round()
