"""Examine a user's images and masks: channels, sizes and classes, of all files that can be read in a few seconds.

A file that cannot be read is left out of what is examined, and returned with the reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from muntin.artifact.answers import ANSWERS, Task
from muntin.errors import DataError
from muntin.images import IGNORED, read_image, read_mask
from muntin.images.decoding import image_size
from muntin.images.opening import PictureFile
from muntin.images.rasters import OpenRasters, Raster, is_windowed, mask_raster, picture_raster, sampled, tiff_header
from muntin.tasks.classes import RGB, ClassSpec, MaskValue, code_color, color_codes, distinct_colors
from muntin.tasks.classify.folders import class_folders
from muntin.text import count

Content = TypeVar("Content")
File = TypeVar("File", bound=PictureFile)
MaskArray = npt.NDArray[Any]
LOOK_S = 5.0
"""Seconds after which no further file is opened, of images and of masks each."""
STRAY_PIXELS, STRAY_SHARE = 100, 1e-4
"""Pixels, and share of all pixels, below both of which a value is questioned."""
_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_MAX_VALUES_BETWEEN = 8  # distinct values between 0 and 255 beyond which masks with mostly these two are taken for smoothed ones
_MIN_EXTREMES = 0.9  # fraction of the pixels that are 0 or 255 in smoothed masks of two classes


def read_some(
    paths: Sequence[File], read: Callable[[File], Content], *, clock: Callable[[], float] = time.monotonic
) -> tuple[dict[File, Content], dict[File, DataError]]:
    """Read the files for `LOOK_S` seconds, in random order. Returns their contents, and the errors of those that cannot be read.

    `clock`: returns seconds. Raises the first error if no file can be read.
    """
    contents: dict[int, Content] = {}
    errors: dict[int, DataError] = {}
    end = clock() + LOOK_S
    for number in np.random.default_rng(0).permutation(len(paths)).tolist():
        if contents and clock() >= end:
            break
        try:
            contents[number] = read(paths[number])
        except DataError as error:
            errors[number] = error
    if not contents:
        raise errors[min(errors)]
    return {paths[number]: contents[number] for number in sorted(contents)}, {paths[number]: errors[number] for number in sorted(errors)}


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """Properties of a picture that a recipe depends on."""

    channels: int
    shorter_side: int
    opacity: bool
    """True if there are four channels and the fourth is constant."""


def picture_facts(path: PictureFile) -> PictureFacts:
    """Decode a picture, of a large TIFF some windows, and examine it. Raises DataError."""
    picture = picture_raster(path, OpenRasters(), None) if is_windowed(path) else read_image(path, None)
    image_HWC = sampled(picture) if isinstance(picture, Raster) else picture
    opacity = image_HWC.shape[2] == 4 and not np.ptp(image_HWC[:, :, 3])
    return PictureFacts(channels=image_HWC.shape[2], shorter_side=min(picture.shape[:2]), opacity=opacity)


def size_errors(pairs: Iterable[tuple[PictureFile, PictureFile]]) -> dict[PictureFile, DataError]:
    """The errors of images whose masks have another size, read from the headers."""
    errors: dict[PictureFile, DataError] = {}
    for image, mask in pairs:
        (height, width), (mask_height, mask_width) = (_header_size(file) for file in (image, mask))
        if (height, width) != (mask_height, mask_width):
            errors[image] = DataError(f"{image} is {width}×{height} and its mask {mask_width}×{mask_height}: they must be of one size")
    return errors


def _header_size(file: PictureFile) -> tuple[int, int]:
    header = tiff_header(file) if is_windowed(file) else None
    return image_size(file) if header is None else (header.height, header.width)


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Number of a mask's pixels by value; by `color_codes` if it is `colored`: if its channels differ."""

    pixels: Mapping[int, int]
    colored: bool = False


def mask_facts(path: PictureFile) -> MaskFacts:
    """Decode a mask, of a large TIFF some windows, and count its pixels. Raises DataError."""
    mask = _mask_pixels(path)
    if mask.ndim == 2:
        return MaskFacts(pixels=pixel_counts([mask]))
    colored = not (mask == mask[:, :, :1]).all()
    return MaskFacts(pixels=pixel_counts([color_codes(mask) if colored else mask[:, :, 0]]), colored=colored)


def _mask_pixels(path: PictureFile) -> MaskArray:
    """The mask in a file, of a large TIFF some windows. Pixels of the value that a TIFF marks as `nodata` are 255. Raises DataError."""
    mask = sampled(mask_raster(path, OpenRasters(), None), windows=8) if is_windowed(path) else read_mask(path)
    header = tiff_header(path)
    if header is None or header.nodata is None or mask.ndim == 3:
        return mask
    return np.where(mask == header.nodata, IGNORED, mask).astype(np.result_type(mask, np.uint8))


def picture_channels(facts: Mapping[PictureFile, PictureFacts]) -> int:
    """The number of channels to read pictures with: 1 if all are grey; that of .npy files if all agree; 4 if all are TIFFs of four
    channels and the fourth is not constant (opacity); 3 otherwise."""
    channels, suffixes = {picture.channels for picture in facts.values()}, {path.suffix.lower() for path in facts}
    if len(channels) == 1 and (1 in channels or suffixes == {".npy"}):
        return channels.pop()
    four_channel_tiffs = channels == {4} and suffixes <= {".tif", ".tiff"}
    return 4 if four_channel_tiffs and not all(picture.opacity for picture in facts.values()) else 3


def crop_side(facts: Mapping[PictureFile, PictureFacts], task: Task) -> int:
    """Side of the training crops, pixels: the median of the pictures' shorter sides rounded down to a multiple of 32, at least 32 and at
    most `Answer.usual_crop`."""
    shorter_side = int(median(picture.shorter_side for picture in facts.values()))
    return min(ANSWERS[task].usual_crop, max(32, shorter_side // 32 * 32))


def classes_in_folders(folder: Path, chosen: Sequence[Path]) -> list[ClassSpec]:
    """A class for each of the chosen folders in `folder`."""
    names = [path.name for path in class_folders(folder).values() if path in chosen]
    return [ClassSpec(name=name, color=color) for name, color in zip(names, distinct_colors(len(names)), strict=True)]


@dataclass(frozen=True, kw_only=True)
class StrayValue:
    """A value of very few pixels. `file`: the first mask that holds it."""

    value: MaskValue
    pixels: int
    masks: int
    file: PictureFile

    @property
    def text(self) -> str:
        """The pixels and masks in words."""
        place = self.file.name + (f" and {self.masks - 1} more" if self.masks > 1 else "")
        return f"{count(self.pixels, 'pixel')} in {count(self.masks, 'mask')} ({place})"


@dataclass(frozen=True, kw_only=True)
class MaskClasses:
    """The classes that masks hold, and the value to ignore: 255, unless it is a class itself or the masks hold colours."""

    classes: tuple[ClassSpec, ...]
    ignore: int | None
    shares: tuple[float, ...]
    """Share of the pixels of each class. The sum is less than 1 if pixels are ignored."""
    stray: tuple[StrayValue, ...] = ()
    """Values of classes that may be mistakes."""


def classes_in_masks(masks: Mapping[PictureFile, MaskFacts], folder: Path) -> MaskClasses:
    """Find the classes in masks of `folder`.

    Raises DataError if the values cannot be classes: fewer than two or more than 255 of them, JPEG masks, smoothed edges.
    """
    paths = list(masks)
    if any(facts.colored for facts in masks.values()):
        _check_lossless(paths, folder)
        by_mask = {path: facts.pixels if facts.colored else _color_counts(path, facts) for path, facts in masks.items()}
        pixels = _summed(by_mask.values())
        _check_count(len(pixels), folder)
        painted = [code_color(code) for code in sorted(pixels)]
        classes = [ClassSpec(name=f"class-{index}", color=color, value=color) for index, color in enumerate(painted)]
        stray = _stray(by_mask, pixels, sorted(pixels), painted)
        return MaskClasses(classes=tuple(classes), ignore=None, shares=class_shares(pixels, sorted(pixels)), stray=stray)
    by_mask = {path: facts.pixels for path, facts in masks.items()}
    pixels = _summed(by_mask.values())
    _check_sharp(pixels, paths, folder)
    values = sorted(pixels)
    if values[0] < 0 or values[-1] > 65535:
        raise DataError(f"the masks in {folder} hold values from {values[0]} to {values[-1]}: classes are numbers from 0 to 65535")
    ignore = None if _is_255_a_class(values) else IGNORED
    values = [value for value in values if value != ignore]
    _check_count(len(values), folder)
    colors = _palette_colors(by_mask, values) or list(distinct_colors(len(values)))
    pairs = zip(values, colors, strict=True)
    classes = [ClassSpec(name=f"class-{index}", color=color, value=value) for index, (value, color) in enumerate(pairs)]
    stray = _stray(by_mask, pixels, values, values)
    return MaskClasses(classes=tuple(classes), ignore=ignore, shares=class_shares(pixels, values), stray=stray)


def _stray(
    by_mask: Mapping[PictureFile, Mapping[int, int]], pixels: Mapping[int, int], codes: Sequence[int], values: Sequence[MaskValue]
) -> tuple[StrayValue, ...]:
    bound = min(STRAY_PIXELS, STRAY_SHARE * sum(pixels.values()))
    found = []
    for code, value in zip(codes, values, strict=True):
        if pixels[code] < bound:
            files = [path for path, counts in by_mask.items() if code in counts]
            found.append(StrayValue(value=value, pixels=pixels[code], masks=len(files), file=files[0]))
    return tuple(found)


def _color_counts(path: PictureFile, facts: MaskFacts) -> dict[int, int]:
    """Pixels by colour of a mask without colours of its own, among others that have some: of its palette, or grey."""
    if is_windowed(path):
        return {code << 16 | code << 8 | code: pixels for code, pixels in facts.pixels.items()}
    return pixel_counts([color_codes(read_mask(path, colors=True))])


def _summed(counts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    pixels: Counter[int] = Counter()
    for each in counts:
        pixels.update(each)
    return pixels


def class_shares(pixels: Mapping[int, int], values: Sequence[int]) -> tuple[float, ...]:
    total = sum(pixels.values())
    return tuple(pixels.get(value, 0) / total for value in values)


def ignored_value_notes(masks: Mapping[PictureFile, MaskFacts]) -> list[str]:
    """A note if 255 may be a class: no mask that holds it holds a class other than 0, and other masks do."""
    values = [set(facts.pixels) for facts in masks.values() if not facts.colored]
    with_255 = [mask_values for mask_values in values if IGNORED in mask_values]
    if not with_255 or not set().union(*with_255) <= {0, IGNORED} or set().union(*values) <= {0, IGNORED}:
        return []
    return [
        f"255 is ignored, and the {len(with_255)} of {len(values)} masks that hold it hold no class but 0: if 255 is a class in them, "
        "replace it by the number that this class has in the other masks"
    ]


def pixel_counts(masks: Sequence[npt.NDArray[Any]]) -> dict[int, int]:
    """Number of pixels by value."""
    pixels: Counter[int] = Counter()
    for mask in masks:
        if mask.dtype == np.uint8:  # ten times faster than sorting
            counts = np.bincount(mask.ravel())
            values = counts.nonzero()[0]
            counts = counts[values]
        else:
            values, counts = np.unique(mask, return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return pixels


def _check_sharp(pixels: Mapping[int, int], paths: Sequence[PictureFile], folder: Path) -> None:
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


def _check_lossless(paths: Sequence[PictureFile], folder: Path) -> None:
    lossy = next((path for path in paths if path.suffix.lower() in _LOSSY_SUFFIXES), None)
    if lossy is not None:
        raise DataError(
            f"{folder}: {lossy.name} is a JPEG, which blurs classes into each other; save masks as PNG "
            "(if they hold two classes, threshold them at 128)"
        )


def _check_count(number: int, folder: Path) -> None:
    if number > (most := ANSWERS["segment"].most_classes):
        raise DataError(f"the masks in {folder} hold {number} values, more than {most}: save them as PNG (JPEG blurs them)")
    if number < 2:
        raise DataError(f"the masks in {folder} hold {number} classes: at least two classes are needed")


def _is_255_a_class(values: Sequence[int]) -> bool:
    """Return True if 255 is a class, as in masks of grey levels (0, 255; 0, 128, 255), and not the ignored value.

    Class numbers count up from 0, grey levels are far apart: with up to four values below 255 the largest of them is above 63, with more
    values above 127 and above twice their number.
    """
    below = [value for value in values if value != IGNORED]
    if IGNORED not in values or not below:
        return False
    return below == [0] or max(below) > max(63 if len(below) <= 4 else 127, 2 * len(below))


def _palette_colors(masks: Mapping[PictureFile, Mapping[int, int]], values: Sequence[int]) -> list[RGB] | None:
    """The colours of the values in the masks' palettes; None if there is no palette, it is grey, or two values have one colour."""
    color_by_value: dict[int, RGB] = {}
    for path, pixels in masks.items():
        if pixels.keys() <= color_by_value.keys():
            continue
        if is_windowed(path):
            return None
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
