"""Training batches: random crops of samples.

A batch is a pure function of (seed, step), so a resumed run gets the same batches and no generator state is saved. `Crops.draws` makes the
random choices, `cut` applies them.

Axis letters: B batch, C channels, H, W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from muntin.data.augmentation import NO_AUGMENTATION, Augmentation
from muntin.data.batch_feed import ImageBatch, prefetch
from muntin.data.restoration.crops import cut_pair
from muntin.data.source import DataTask, HeldSamples, Sample, Samples
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.opening import UInt8
from muntin.images.rasters import Raster, bands
from muntin.text import count

_CELL = 32  # side of the cells by which `class_cells` indexes the classes, pixels


MIXUP_ALPHA = 0.4
"""Both parameters of the beta distribution of mixup's shares (Zhang et al., 1710.09412, section 3: 0.1 to 0.4). CutMix's are 1."""


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
    degradation_seed: int = 0  # of restore
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


class BatchMaker(Protocol):
    """Makes training batches, each from its step alone."""

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """The batch of a step, or some rows of it."""


class Crops:
    """Random square crops of the samples of a split.

    `segment`: pictures are drawn by area, and the window's position uniformly. A fraction `rare` of the crops is centred on a pixel of a
    class that is drawn uniformly. A picture smaller than the window lies at a random position in it, surrounded by 0 in the image and 255
    (ignored) in the target. `restore`: the same without zoom and rotation, and a smaller picture is continued by mirroring. `classify`:
    pictures are drawn uniformly, and the window is the largest square that fits, divided by the zoom; what a rotation brings in from
    outside the picture is its mirror image. `classes`: their number, for mixup and cutmix.

    The constructor reads the header of every picture; with `rare` it also reads every mask once. Raises DataError if there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        task: DataTask,
        crop: int,
        batch_size: int,
        seed: int,
        augmentation: Augmentation = NO_AUGMENTATION,
        rare: float = 0.0,
        classes: int = 0,
    ) -> None:
        if not len(samples):
            raise DataError("there are no pictures to crop: check the folders and the shares of the splits")
        self._samples = samples if isinstance(samples, Samples) else HeldSamples(samples)
        self._sizes = self._samples.sizes()
        self._task, self._crop, self._batch_size = task, crop, batch_size
        self._seed, self._augmentation, self._rare = seed, augmentation, rare
        weights = np.array([1 if task == "classify" else height * width for height, width in self._sizes], dtype=np.float64)
        self._upper_edges = np.cumsum(weights) / weights.sum()
        self._classes = classes if task == "classify" and augmentation.mixup + augmentation.cutmix > 0 else 0
        self._cells = class_cells(samples) if rare > 0 and task == "segment" else []

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """Images uint8 (B, C, H, W), channels last in memory, and targets: int64 (B, H, W), or (B,) for `classify`, with mixup or cutmix
        shares of the classes float32 (B, K); or uint8 (B, C, scale*H, scale*W) for `restore`. `rows`: of the batch."""
        crops = [self._make(draw) for draw in self.draws(step)[rows]]
        images_BHWC = torch.stack([image_CHW.permute(1, 2, 0) for image_CHW, _ in crops])
        target = torch.stack([target for _, target in crops])
        return images_BHWC.permute(0, 3, 1, 2), target if self._classes or self._task == "restore" else target.long()

    def _make(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The crop of a draw, with those that are joined with it."""
        image_CHW, target = cut(self._samples[draw.index], draw, self._crop)
        if self._classes:
            target = one_hot(target.long(), self._classes).float()
        if draw.mix is None:
            return image_CHW, target
        return join(draw.mix, image_CHW, target, [self._make(other) for other in draw.mix.others])

    def draws(self, step: int) -> list[Draw]:
        """The random choices for the crops of a step: a pure function of the seed and the step."""
        generator = np.random.default_rng((self._seed, step))
        return [self._mixed(self._draw(generator), generator) for _ in range(self._batch_size)]

    def _mixed(self, draw: Draw, generator: np.random.Generator) -> Draw:
        """The draw with others that are joined with it, in the shares of the crops that the augmentation says."""
        ranges, crop = self._augmentation, self._crop
        mix: Mix | None = None
        if self._task == "segment" and ranges.mosaic and generator.random() < ranges.mosaic:
            row, column = (int(value) for value in generator.integers(crop // 4, crop - crop // 4, size=2))
            others = tuple(self._draw(generator) for _ in range(3))
            mix = Mix(kind="mosaic", others=others, rows=(0, row), columns=(0, column))
        elif self._classes:
            chance = generator.random()
            if chance < ranges.mixup:
                share = float(generator.beta(MIXUP_ALPHA, MIXUP_ALPHA))
                mix = Mix(kind="mixup", others=(self._draw(generator),), share=share)
            elif chance < ranges.mixup + ranges.cutmix:
                side = max(1, round(crop * math.sqrt(generator.random())))
                top, left = (int(value) for value in generator.integers(0, crop - side + 1, size=2))
                rows, columns = (top, top + side), (left, left + side)
                mix = Mix(kind="cutmix", others=(self._draw(generator),), rows=rows, columns=columns, share=side**2 / crop**2)
        return draw if mix is None else replace(draw, mix=mix)

    def _draw(self, generator: np.random.Generator) -> Draw:
        ranges = self._augmentation
        zoom = math.exp(generator.uniform(math.log(ranges.scale[0]), math.log(ranges.scale[1])))
        if self._cells and generator.random() < self._rare:
            index, row, column = self._rare_pixel(generator)
            side = max(1, round(self._crop / zoom))
            height, width = self._sizes[index]
            top, left = _centred_start(row, side, height), _centred_start(column, side, width)
        else:
            index = min(int(np.searchsorted(self._upper_edges, generator.random(), side="right")), len(self._upper_edges) - 1)
            height, width = self._sizes[index]
            side = max(1, round((min(height, width) if self._task == "classify" else self._crop) / zoom))
            if self._task == "classify":
                side = min(side, height, width)
            elif self._task == "restore":
                side = self._crop
            top, left = _random_start(generator, side, height), _random_start(generator, side, width)
        return Draw(
            index=index,
            top=top,
            left=left,
            side=side,
            flip_horizontal=bool(generator.random() < ranges.flip_horizontal),
            flip_vertical=bool(generator.random() < ranges.flip_vertical),
            brightness=1 + float(generator.uniform(-ranges.brightness, ranges.brightness)),
            contrast=1 + float(generator.uniform(-ranges.contrast, ranges.contrast)),
            saturation=1 + float(generator.uniform(-ranges.saturation, ranges.saturation)),
            # without these, crops have the same random numbers as before there were any
            angle=float(generator.uniform(-ranges.rotation, ranges.rotation)) if ranges.rotation and self._task != "restore" else 0.0,
            hue=float(generator.uniform(-ranges.hue, ranges.hue)) if ranges.hue else 0.0,
            degradation_seed=int(generator.integers(1 << 32)) if self._task == "restore" else 0,
        )

    def _rare_pixel(self, generator: np.random.Generator) -> tuple[int, int, int]:
        """Sample index, row and column of a pixel of a class drawn uniformly."""
        label, cells = self._cells[generator.integers(len(self._cells))]
        index, cell_row, cell_column = (int(value) for value in cells[generator.integers(len(cells))])
        top, left = cell_row * _CELL, cell_column * _CELL
        pixels = np.argwhere(self._samples[index].labels[top : top + _CELL, left : left + _CELL] == label)
        row, column = pixels[generator.integers(len(pixels))]
        return index, top + int(row), left + int(column)


def small_picture_notes(samples: Samples, *, task: DataTask, crop: int) -> tuple[str, ...]:
    """A note if training pictures have a side shorter than the crop, with their number, the smallest one, and what crops do with them."""
    sizes = samples.sizes()
    small = [size for size in sizes if min(size) < crop]
    if not small:
        return ()
    height, width = min(small, key=min)
    effect = {"segment": "the rest of a crop is black and ignored", "classify": "they are enlarged", "restore": "they are mirrored"}[task]
    share = f"{len(small)} of {count(len(sizes), 'training picture')}"
    return (f"{share} have a side shorter than data.crop {crop} (the smallest is {width}×{height}): {effect}",)


def cut(sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
    """Make the crop that `draw` describes: image uint8 (C, crop, crop), target uint8 (crop, crop), or () for `classify`, or for
    `restore` (C, scale*crop, scale*crop).
    """
    if sample.restores:
        return cut_pair(sample, draw, lambda clean_CHW: _with_color_changes(clean_CHW, draw))
    window, size = (draw, crop) if not draw.angle else _around(draw, crop)
    mirrored = draw.angle and isinstance(sample.target, int)
    image_HWC = _mirrored_window(np.asarray(sample.image), window) if mirrored else _window(sample.image, window, 0)
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
    target = torch.tensor(sample.target) if isinstance(sample.target, int) else torch.from_numpy(_window(sample.target, window, IGNORED))
    if window.side != size:
        image_CHW = v2.resize_image(image_CHW, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)
        if target.ndim:  # NEAREST would sample half a step to the upper left of where bilinear samples
            target = v2.resize_image(target[None], [size, size], interpolation=InterpolationMode.NEAREST_EXACT)[0]
    if draw.angle:
        turned = v2.rotate_image(image_CHW, draw.angle, interpolation=InterpolationMode.BILINEAR)
        image_CHW = v2.center_crop_image(turned, [crop, crop])
        if target.ndim:
            turned = v2.rotate_image(target[None], draw.angle, interpolation=InterpolationMode.NEAREST, fill=[float(IGNORED)])
            target = v2.center_crop_image(turned, [crop, crop])[0]
    if draw.flip_horizontal:
        image_CHW, target = v2.horizontal_flip(image_CHW), v2.horizontal_flip(target) if target.ndim else target
    if draw.flip_vertical:
        image_CHW, target = v2.vertical_flip(image_CHW), v2.vertical_flip(target) if target.ndim else target
    return _with_color_changes(image_CHW, draw), target


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


def _around(draw: Draw, crop: int) -> tuple[Draw, int]:
    """The window around that of a draw which holds it at any place of its rotation, and the side that it is resized to."""
    radians = math.radians(draw.angle)
    side = math.ceil(draw.side * (abs(math.cos(radians)) + abs(math.sin(radians))))
    side += (side - draw.side) % 2  # so that both have one centre
    more = (side - draw.side) // 2
    return replace(draw, top=draw.top - more, left=draw.left - more, side=side), max(crop, round(crop * side / draw.side))


def _mirrored_window(image_HWC: UInt8, draw: Draw) -> UInt8:
    """A copy of the window; outside the picture it is mirrored."""
    rows, columns = (
        length - 1 - np.abs(np.arange(start, start + draw.side) % (2 * length) - length + 0.5).astype(int)
        for start, length in ((draw.top, image_HWC.shape[0]), (draw.left, image_HWC.shape[1]))
    )
    return np.ascontiguousarray(image_HWC[np.ix_(rows, columns)])


def _with_color_changes(image_CHW: Tensor, draw: Draw) -> Tensor:
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


def class_cells(samples: Sequence[Sample]) -> list[tuple[int, np.ndarray[tuple[int, int], np.dtype[np.int32]]]]:
    """For each class that occurs: (class, cells (n, 3)), where a cell of 32 × 32 pixels is its sample index, cell row and cell column.

    Reads every target once. The result takes 12 bytes for each cell and class.
    """
    cells_by_class: dict[int, list[np.ndarray[tuple[int, int], np.dtype[np.int32]]]] = {}
    for index, top, labels_HW in ((index, *band) for index, sample in enumerate(samples) for band in bands(sample.labels)):
        height, width = labels_HW.shape
        padded = np.pad(labels_HW, ((0, -height % _CELL), (0, -width % _CELL)), constant_values=IGNORED)
        grid = padded.reshape(padded.shape[0] // _CELL, _CELL, padded.shape[1] // _CELL, _CELL)
        for label in np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256)[:IGNORED]).tolist():
            cells = np.argwhere((grid == label).any(axis=(1, 3)))
            cells[:, 0] += top // _CELL
            cells_by_class.setdefault(label, []).append(np.insert(cells, 0, index, axis=1).astype(np.int32))
    return [(label, np.concatenate(cells_by_class[label])) for label in sorted(cells_by_class)]


def calibration_batches(
    samples: Sequence[Sample], *, crop: int, count: int, batch_size: int, seed: int, task: DataTask = "segment"
) -> Iterator[Tensor]:
    """Yield `count` crops without augmentation, uint8 (B, C, crop, crop), in batches of `batch_size`; the last batch may be smaller."""
    crops = Crops(samples, task=task, crop=crop, batch_size=batch_size, seed=seed)
    for step, (images, _) in prefetch(crops.batch, 0, math.ceil(count / batch_size)):
        yield images[: count - step * batch_size]


def _window(array: UInt8 | Raster, draw: Draw, fill: int) -> UInt8:
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


def _random_start(generator: np.random.Generator, side: int, length: int) -> int:
    """A random start of a window of `side` pixels: inside the picture, or, if the picture is smaller, around the whole picture."""
    return int(generator.integers(min(0, length - side), max(0, length - side) + 1))


def _centred_start(center: int, side: int, length: int) -> int:
    """The start of the window around `center`, moved as little as needed to lie inside the picture, or around it if it is smaller."""
    return min(max(center - side // 2, min(0, length - side)), max(0, length - side))
