"""Images for people to look at: labels in colours, differences from the truth; and the square that a classifier sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images.opening import UInt8
from muntin.images.sources import PictureSource

IGNORED = 255
"""Label of pixels that count neither in the loss nor in a metric."""
IGNORED_COLOR = (0, 0, 0)
WRONG, RIGHT, UNKNOWN = (214, 40, 57), (226, 232, 236), (120, 120, 120)
"""Colours of `difference`."""


def to_rgb(image_HWC: UInt8) -> UInt8:
    """(H, W, 3) from any number of channels: one or two become grey, of more the first three are taken."""
    return np.repeat(image_HWC[:, :, :1], 3, axis=2) if image_HWC.shape[2] < 3 else image_HWC[:, :, :3]


def middle_square(image_HWC: PictureSource, side: int) -> UInt8:
    """The largest square in the middle, resized to `side` pixels: bilinear, antialiased where it shrinks. (H, W, C) to (side, side, C)."""
    return middle_part(image_HWC, side, side)


def middle_part(image_HWC: PictureSource, height: int, width: int) -> UInt8:
    """The largest part in the middle with the proportions of a size, resized to it as by `middle_square`: to (height, width, C)."""
    H, W = image_HWC.shape[:2]
    rows, columns = min(H, max(1, W * height // width)), min(W, max(1, H * width // height))
    top, left = (H - rows) // 2, (W - columns) // 2
    part = image_HWC[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return np.ascontiguousarray(part)
    planes = (Image.fromarray(np.ascontiguousarray(part[:, :, c])) for c in range(part.shape[2]))
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes], axis=2)


def colorize(labels_HW: npt.NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
    """Labels (H, W) in the classes' colours: (H, W, 3). 255, ignored where it is no class, is black.

    Raises DataError for a label without a class.
    """
    labels = np.asarray(labels_HW)
    known = (labels >= 0) & ((labels < len(classes)) | (labels == IGNORED))
    if not known.all():
        raise DataError(f"label {labels[~known].ravel()[0]} has no class: there are {len(classes)} classes, numbered from 0")
    table = np.full((max(256, len(classes)), 3), IGNORED_COLOR, dtype=np.uint8)
    if classes:
        table[: len(classes)] = [entry.color for entry in classes]
    painted: UInt8 = table[labels]
    return painted


def overlay(image_HWC: UInt8, labels_HW: npt.NDArray[Any], classes: Sequence[ClassInfo], opacity: float = 0.5) -> UInt8:
    """The labels' colours blended with the picture: (H, W, 3). `opacity`: 0 (picture) to 1 (colours). Ignored pixels are not painted.

    Raises DataError: sizes differ, opacity outside 0-1, a label without a class.
    """
    if image_HWC.shape[:2] != np.shape(labels_HW):
        raise DataError(f"the image is {image_HWC.shape[:2]} and its labels {np.shape(labels_HW)} (height, width): they must be equal")
    if not 0 <= opacity <= 1:
        raise DataError(f"opacity {opacity}: from 0 (picture) to 1 (labels)")
    base = np.ascontiguousarray(to_rgb(image_HWC))
    blended = np.array(Image.blend(Image.fromarray(base), Image.fromarray(colorize(labels_HW, classes)), opacity))
    ignored = (np.asarray(labels_HW) == IGNORED) & (len(classes) <= IGNORED)
    blended[ignored] = base[ignored]
    return blended


def difference(labels_HW: npt.NDArray[Any], truth_HW: UInt8) -> UInt8:
    """RGB (H, W, 3): red where a label is wrong, pale where it is right, grey where the truth is ignored."""
    picture = np.empty((*truth_HW.shape, 3), np.uint8)
    picture[...] = RIGHT
    picture[labels_HW != truth_HW] = WRONG
    picture[truth_HW == IGNORED] = UNKNOWN
    return picture
