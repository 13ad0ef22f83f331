"""Examine pictures and masks, at most 64 of a folder: channels, size, and the classes with their values and colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from muntin.data.classes import RGB, ClassSpec, code_color, color_codes, distinct_colors
from muntin.data.folders import class_folders
from muntin.data.listing import pictures
from muntin.data.source import MAX_CLASSES, DataTask
from muntin.errors import DataError
from muntin.images import IGNORED, image_size, read_image, read_mask

_MAX_OPENED = 64  # files
_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_MAX_VALUES_BETWEEN = 8  # distinct values between 0 and 255 beyond which masks with mostly these two are taken for smoothed ones
_MIN_EXTREMES = 0.9  # fraction of the pixels that are 0 or 255 in smoothed masks of two classes


def spread(paths: Sequence[Path]) -> Sequence[Path]:
    """At most 64 of the paths, at even distances."""
    return paths[:: max(1, -(-len(paths) // _MAX_OPENED))]


def examined_masks(folder: Path | None) -> tuple[int, int] | None:
    """(number of masks opened, number of masks) in a folder; None if all masks are opened or there is no folder."""
    paths = [] if folder is None else pictures(folder)
    examined = spread(paths)
    return None if len(examined) == len(paths) else (len(examined), len(paths))


def picture_channels(paths: Sequence[Path]) -> int:
    """The number of channels to read pictures with: 1 if all are grey; that of .npy files if all agree; 4 if all are TIFFs of four
    channels and the fourth is not constant (opacity); 3 otherwise."""
    images = [read_image(path, None) for path in paths]
    channels, suffixes = {image.shape[2] for image in images}, {path.suffix.lower() for path in paths}
    if len(channels) == 1 and (1 in channels or suffixes == {".npy"}):
        return int(channels.pop())
    four_channel_tiffs = channels == {4} and suffixes <= {".tif", ".tiff"}
    return 4 if four_channel_tiffs and any(np.ptp(image[:, :, 3]) for image in images) else 3


def crop_side(paths: Sequence[Path], task: DataTask) -> int:
    """Side of the training crops, pixels: the median of the pictures' shorter sides rounded down to a multiple of 32, at least 32 and at
    most 256 (`classify`: 224)."""
    shorter_side = int(median(min(image_size(path)) for path in paths))
    return min(256 if task == "segment" else 224, max(32, shorter_side // 32 * 32))


def classes_in_folders(folder: Path) -> list[ClassSpec]:
    """A class for each folder in `folder` that holds pictures."""
    names = [path.name for path in class_folders(folder).values() if pictures(path)]
    return [ClassSpec(name=name, color=color) for name, color in zip(names, distinct_colors(len(names)), strict=True)]


def classes_in_masks(folder: Path) -> tuple[list[ClassSpec], int | None]:
    """The classes that the masks hold, and the value to ignore: 255, unless it is a class itself or the masks hold colours.

    Raises DataError if the values cannot be classes: fewer than two or more than 255 of them, JPEG masks, smoothed edges.
    """
    paths = spread(pictures(folder))
    masks = [read_mask(path) for path in paths]
    if any(mask.ndim == 3 and not (mask == mask[:, :, :1]).all() for mask in masks):
        _check_lossless(paths, folder)
        codes = set().union(*(np.unique(color_codes(read_mask(path, colors=True))).tolist() for path in paths))
        _check_count(len(codes), folder)
        colors = [code_color(code) for code in sorted(codes)]
        return [ClassSpec(name=f"class-{index}", color=color, value=color) for index, color in enumerate(colors)], None
    pixels = _pixel_counts(masks)
    _check_sharp(pixels, paths, folder)
    values = sorted(pixels)
    if values[0] < 0 or values[-1] > 65535:
        raise DataError(f"the masks in {folder} hold values from {values[0]} to {values[-1]}: classes are numbers from 0 to 65535")
    ignore = None if _is_255_a_class(values) else IGNORED
    values = [value for value in values if value != ignore]
    _check_count(len(values), folder)
    colors = _palette_colors(paths, values) or list(distinct_colors(len(values)))
    pairs = zip(values, colors, strict=True)
    return [ClassSpec(name=f"class-{index}", color=color, value=value) for index, (value, color) in enumerate(pairs)], ignore


def ignored_value_notes(folder: Path) -> list[str]:
    """A note if 255 may be a class: no mask that holds it holds a class other than 0, and other masks do."""
    masks = [read_mask(path) for path in spread(pictures(folder))]
    values = [set(np.unique(mask).tolist()) for mask in masks if mask.ndim == 2]
    with_255 = [mask_values for mask_values in values if IGNORED in mask_values]
    if not with_255 or not set().union(*with_255) <= {0, IGNORED} or set().union(*values) <= {0, IGNORED}:
        return []
    return [
        f"255 is ignored, and the {len(with_255)} of {len(values)} masks that hold it hold no class but 0: if 255 is a class in them, "
        "replace it by the number that this class has in the other masks"
    ]


def _pixel_counts(masks: Sequence[npt.NDArray[Any]]) -> dict[int, int]:
    """Number of pixels by value."""
    pixels: Counter[int] = Counter()
    for mask in masks:
        values, counts = np.unique(mask, return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return pixels


def _check_sharp(pixels: Mapping[int, int], paths: Sequence[Path], folder: Path) -> None:
    """Raise DataError for masks of two classes, 0 and 255, with smoothed edges: each value in between would become a class."""
    between = [value for value in pixels if value not in (0, 255)]
    if not between:
        return
    _check_lossless(paths, folder)
    extremes = pixels.get(0, 0) + pixels.get(255, 0)
    spans_the_middle = min(between) < 128 <= max(between)
    if len(between) > _MAX_VALUES_BETWEEN and spans_the_middle and extremes > _MIN_EXTREMES * sum(pixels.values()):
        raise DataError(
            f"the masks in {folder} hold the values {', '.join(map(str, sorted(pixels)[:4]))}, ... ({len(pixels)} in all): "
            "their edges were smoothed, as by resizing; save them as PNG of whole class numbers, resized by nearest neighbour; "
            "if they hold two classes, threshold them at 128"
        )


def _check_lossless(paths: Sequence[Path], folder: Path) -> None:
    lossy = next((path for path in paths if path.suffix.lower() in _LOSSY_SUFFIXES), None)
    if lossy is not None:
        raise DataError(
            f"{folder}: {lossy.name} is a JPEG, which blurs classes into each other; save masks as PNG "
            "(if they hold two classes, threshold them at 128)"
        )


def _check_count(count: int, folder: Path) -> None:
    if count > MAX_CLASSES:
        raise DataError(f"the masks in {folder} hold {count} values, more than {MAX_CLASSES}: save them as PNG (JPEG blurs them)")
    if count < 2:
        raise DataError(f"the masks in {folder} hold {count} classes: at least two classes are needed")


def _is_255_a_class(values: Sequence[int]) -> bool:
    """Return True if 255 is a class, as in masks of grey levels (0, 255; 0, 128, 255), and not the ignored value.

    Class numbers count up from 0, grey levels are far apart: with up to four values below 255 the largest of them is above 63, with more
    values above 127 and above twice their number.
    """
    below = [value for value in values if value != IGNORED]
    if IGNORED not in values or not below:
        return False
    return below == [0] or max(below) > max(63 if len(below) <= 4 else 127, 2 * len(below))


def _palette_colors(paths: Sequence[Path], values: Sequence[int]) -> list[RGB] | None:
    """The colours of the values in the masks' palettes; None if there is no palette, it is grey, or two values have one colour."""
    color_by_value: dict[int, RGB] = {}
    for path in paths:
        mask = read_mask(path)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            return None
        pixel_colors = read_mask(path, colors=True).reshape(-1, 3)
        for value, first in zip(*np.unique(mask, return_index=True), strict=True):
            red, green, blue = pixel_colors[first].tolist()
            color_by_value.setdefault(int(value), (red, green, blue))
    colors = [color_by_value[value] for value in values]
    grey = all(len(set(color)) == 1 for color in colors)
    return colors if not grey and len(set(colors)) == len(colors) else None
