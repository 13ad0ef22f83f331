"""Training batches: random crops of samples.

A batch is a pure function of (seed, step), so a resumed run gets the same batches and no generator state is saved. `Crops.draws` makes the
random choices, the task's `Learning.cut` applies them.

Axis letters: B batch, C channels, H, W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from muntin.artifact.answers import ANSWERS, Task
from muntin.data.augmentation import NO_AUGMENTATION, Augmentation
from muntin.data.batch_feed import ImageBatch, prefetch
from muntin.data.source import HeldSamples, Samples
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.rasters import bands
from muntin.tasks.crops import Draw, Mix, join
from muntin.tasks.learning import LEARNING
from muntin.tasks.samples import Sample
from muntin.text import count

_CELL = 32  # side of the cells by which `class_cells` indexes the classes, pixels


MIXUP_ALPHA = 0.4
"""Both parameters of the beta distribution of mixup's shares (Zhang et al., 1710.09412, section 3: 0.1 to 0.4). CutMix's are 1."""


class BatchMaker(Protocol):
    """Makes training batches, each from its step alone."""

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """The batch of a step, or some rows of it."""


class Crops:
    """Random square crops of the samples of a split.

    Pictures are drawn by area, or uniformly where a picture has one answer, and the window's position uniformly. A fraction `rare` of the
    crops is centred on a pixel of a class that is drawn uniformly. A picture smaller than the window lies at a random position in it.
    `classes`: their number, for mixup and cutmix.

    The constructor reads the header of every picture; with `rare` it also reads every mask once. Raises DataError if there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        task: Task,
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
        self._learning, self._crop, self._batch_size = LEARNING[task], crop, batch_size
        self._seed, self._augmentation, self._rare = seed, augmentation, rare
        weights = np.array([1 if ANSWERS[task].one else height * width for height, width in self._sizes], dtype=np.float64)
        self._upper_edges = np.cumsum(weights) / weights.sum()
        self._classes = classes if "mixup" in self._learning.mixtures and augmentation.mixup + augmentation.cutmix > 0 else 0
        self._cells = class_cells(samples) if rare > 0 and ANSWERS[task].masks else []

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """Images uint8 (B, C, H, W), channels last in memory, and the task's targets; with mixup or cutmix shares of the classes, float32
        (B, K). `rows`: of the batch."""
        crops = [self._make(draw) for draw in self.draws(step)[rows]]
        images_BHWC = torch.stack([image_CHW.permute(1, 2, 0) for image_CHW, _ in crops])
        return images_BHWC.permute(0, 3, 1, 2), self._learning.batch([target for _, target in crops])

    def _make(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The crop of a draw, with those that are joined with it."""
        image_CHW, target = self._learning.cut(self._samples[draw.index], draw, self._crop)
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
        if "mosaic" in self._learning.mixtures and ranges.mosaic and generator.random() < ranges.mosaic:
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
            side = self._learning.window_side(self._crop, zoom, height, width)
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
            angle=float(generator.uniform(-ranges.rotation, ranges.rotation)) if ranges.rotation and self._learning.rotates else 0.0,
            hue=float(generator.uniform(-ranges.hue, ranges.hue)) if ranges.hue else 0.0,
            seed=int(generator.integers(1 << 32)) if self._learning.seeded else 0,
        )

    def _rare_pixel(self, generator: np.random.Generator) -> tuple[int, int, int]:
        """Sample index, row and column of a pixel of a class drawn uniformly."""
        label, cells = self._cells[generator.integers(len(self._cells))]
        index, cell_row, cell_column = (int(value) for value in cells[generator.integers(len(cells))])
        top, left = cell_row * _CELL, cell_column * _CELL
        pixels = np.argwhere(self._samples[index].labels[top : top + _CELL, left : left + _CELL] == label)
        row, column = pixels[generator.integers(len(pixels))]
        return index, top + int(row), left + int(column)


def small_picture_notes(samples: Samples, *, task: Task, crop: int) -> tuple[str, ...]:
    """A note if training pictures have a side shorter than the crop, with their number, the smallest one, and what crops do with them."""
    sizes = samples.sizes()
    small = [size for size in sizes if min(size) < crop]
    if not small:
        return ()
    height, width = min(small, key=min)
    share = f"{len(small)} of {count(len(sizes), 'training picture')}"
    return (f"{share} have a side shorter than data.crop {crop} (the smallest is {width}×{height}): {LEARNING[task].small}",)


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


def calibration_batches(samples: Sequence[Sample], *, crop: int, count: int, batch_size: int, seed: int, task: Task) -> Iterator[Tensor]:
    """Yield `count` crops without augmentation, uint8 (B, C, crop, crop), in batches of `batch_size`; the last batch may be smaller."""
    crops = Crops(samples, task=task, crop=crop, batch_size=batch_size, seed=seed)
    for step, (images, _) in prefetch(crops.batch, 0, math.ceil(count / batch_size)):
        yield images[: count - step * batch_size]


def _random_start(generator: np.random.Generator, side: int, length: int) -> int:
    """A random start of a window of `side` pixels: inside the picture, or, if the picture is smaller, around the whole picture."""
    return int(generator.integers(min(0, length - side), max(0, length - side) + 1))


def _centred_start(center: int, side: int, length: int) -> int:
    """The start of the window around `center`, moved as little as needed to lie inside the picture, or around it if it is smaller."""
    return min(max(center - side // 2, min(0, length - side)), max(0, length - side))
