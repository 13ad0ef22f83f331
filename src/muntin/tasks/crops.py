"""Random crops: what is drawn for one, and what crops of all tasks have in common.

Axes: B batch, C channels, H, W rows and columns, K classes, N side of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from muntin.images.opening import UInt8
from muntin.images.rasters import Raster


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random choices for one crop: a square window of `side` pixels in the picture of sample `index`, flips, rotation (degrees,
    counterclockwise) and colour changes; with `mix`, what other crops do to it."""

    index: int
    top: int  # may be negative or beyond the picture if the picture is smaller than the window
    left: int
    side: int
    flip_horizontal: bool = False
    flip_vertical: bool = False
    angle: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    seed: int = 0  # of random numbers of its own
    mix: Mix | None = None


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Crops that are joined with a crop: mosaic: the crop keeps the rectangle of `rows` and `columns` (start, end), three `others` fill the
    rest; cutmix: another fills the rectangle; mixup: another is blended in. `share`: of the other, for mixup and cutmix."""

    kind: Literal["mosaic", "mixup", "cutmix"]
    others: tuple[Draw, ...]
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)
    share: float = 0.0


def changed(
    window_NNC: Callable[[Draw], UInt8], draw: Draw, crop: int, interpolation: InterpolationMode, *, fill: int | None = None
) -> Tensor:
    """Return the crop (C, crop, crop) of a draw, turned and flipped. `window_NNC` reads a window; `fill`: of what a rotation brings in."""
    window, size = (draw, crop) if not draw.angle else _around(draw, crop)
    crop_CHW = torch.from_numpy(window_NNC(window)).permute(2, 0, 1)
    if window.side != size:
        crop_CHW = v2.resize_image(crop_CHW, [size, size], interpolation=interpolation, antialias=True)
    if draw.angle:
        mode = InterpolationMode.NEAREST if interpolation == InterpolationMode.NEAREST_EXACT else interpolation
        turned = v2.rotate_image(crop_CHW, draw.angle, interpolation=mode, fill=None if fill is None else [float(fill)])
        crop_CHW = v2.center_crop_image(turned, [crop, crop])
    if draw.flip_horizontal:
        crop_CHW = v2.horizontal_flip(crop_CHW)
    if draw.flip_vertical:
        crop_CHW = v2.vertical_flip(crop_CHW)
    return crop_CHW


def _around(draw: Draw, crop: int) -> tuple[Draw, int]:
    """The window around that of a draw which holds it at any place of its rotation, and the side that it is resized to."""
    radians = math.radians(draw.angle)
    side = math.ceil(draw.side * (abs(math.cos(radians)) + abs(math.sin(radians))))
    side += (side - draw.side) % 2  # so that both have one centre
    more = (side - draw.side) // 2
    return replace(draw, top=draw.top - more, left=draw.left - more, side=side), max(crop, round(crop * side / draw.side))


def window(array: UInt8 | Raster, draw: Draw, fill: int) -> UInt8:
    """A copy of the window; pixels outside the array are `fill`."""
    height, width = array.shape[:2]
    rows = slice(max(0, draw.top), min(height, draw.top + draw.side))
    columns = slice(max(0, draw.left), min(width, draw.left + draw.side))
    inside = array[rows, columns]
    if inside.shape[:2] == (draw.side, draw.side):
        return inside.copy()
    window = np.full((draw.side, draw.side, *array.shape[2:]), fill, dtype=np.uint8)
    window[rows.start - draw.top : rows.stop - draw.top, columns.start - draw.left : columns.stop - draw.left] = inside
    return window


def mirrored_window(image_HWC: UInt8, draw: Draw) -> UInt8:
    """A copy of the window; outside the picture it is mirrored."""
    rows, columns = (
        length - 1 - np.abs(np.arange(start, start + draw.side) % (2 * length) - length + 0.5).astype(int)
        for start, length in ((draw.top, image_HWC.shape[0]), (draw.left, image_HWC.shape[1]))
    )
    return np.ascontiguousarray(image_HWC[np.ix_(rows, columns)])


def recolored(image_CHW: Tensor, draw: Draw) -> Tensor:
    """Apply brightness to every image, contrast to those of 1 or 3 channels, saturation to those of 3."""
    channels = image_CHW.shape[0]
    if draw.brightness != 1:  # torchvision accepts 1 or 3 channels: each channel is passed as a grey image
        image_CHW = v2.adjust_brightness(image_CHW[:, None], draw.brightness)[:, 0]
    if draw.contrast != 1 and channels in (1, 3):
        image_CHW = v2.adjust_contrast(image_CHW, draw.contrast)
    if draw.saturation != 1 and channels == 3:
        image_CHW = v2.adjust_saturation(image_CHW, draw.saturation)
    if draw.hue and channels == 3:
        image_CHW = v2.adjust_hue(image_CHW, draw.hue)
    return image_CHW


def join(mix: Mix, image_CHW: Tensor, target: Tensor, others: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join a crop with others, as `mix` says: images (C, H, W) with targets (H, W) for mosaic, or (K,) shares of the classes.

    Sources: CutMix (Yun et al., 1905.04899), mixup (Zhang et al., 1710.09412), mosaic (Bochkovskiy et al., 2004.10934, section 3.3).
    """
    if mix.kind == "mosaic":
        row, column = mix.rows[1], mix.columns[1]
        corners = ((slice(row), slice(column, None)), (slice(row, None), slice(column)), (slice(row, None), slice(column, None)))
        image_CHW, target = image_CHW.clone(), target.clone()
        for (rows, columns), (other_CHW, other) in zip(corners, others, strict=True):
            image_CHW[:, rows, columns], target[rows, columns] = other_CHW[:, rows, columns], other[rows, columns]
        return image_CHW, target
    ((other_CHW, other),) = others
    if mix.kind == "mixup":
        image_CHW = torch.lerp(image_CHW.float(), other_CHW.float(), mix.share).round().to(torch.uint8)
    else:
        image_CHW = image_CHW.clone()
        rows, columns = slice(*mix.rows), slice(*mix.columns)
        image_CHW[:, rows, columns] = other_CHW[:, rows, columns]
    return image_CHW, torch.lerp(target, other, mix.share)
