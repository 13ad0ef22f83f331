"""From samples to training batches: random crops that depend on nothing but a seed and a step.

A batch is a pure function of (seed, step): a run that is resumed at step n sees the batches it would have seen, and there is
no generator state to save. What is drawn (`Crops.draws`) is apart from what is done with it (`cut`). A batch of 16 crops of
256² costs about 13 ms of one core (a Xeon with AVX-512). torchvision's small operations get slower, not faster, when torch
spreads them over threads that the training step uses too, so `prefetch` makes batches in one background thread on one core.

Axis letters: B batch, C channels, H, W rows and columns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from muntin.data.config import NO_AUGMENTATION, Augmentation
from muntin.data.source import DataTask, Sample, UInt8, sizes_of
from muntin.errors import DataError
from muntin.runtime.images import IGNORED

Batch = tuple[Tensor, Tensor]
_CELL = 32  # pixels a side of the cells in which `rare` notes the classes


class Batches(Protocol):
    """Anything that makes the batch of a step."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One crop to be made: a square window of `side` pixels of a sample's picture, what it is turned into, and how."""

    index: int
    top: int  # negative, or too far down, where the picture is smaller than the window
    left: int
    side: int
    flip_horizontal: bool = False
    flip_vertical: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


class Crops:
    """Random square crops of the samples of a split.

    `segment`: a window's place is drawn uniformly over all pictures, larger ones more often. The share `rare` of the crops is
    centred on a pixel of a class drawn uniformly from those that occur. Where a picture is smaller than the window, it lies
    somewhere inside, surrounded by 0 in the image and 255 (ignored) in the target. `classify`: pictures are drawn alike, and
    the window is the largest square that fits, divided by the zoom.

    Costs a look at every picture's header when made; with `rare` every mask is read once. Raises DataError for no samples.
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
    ) -> None:
        if not len(samples):
            raise DataError("there are no pictures to make crops of: check the folders and the shares of the splits")
        self._samples, self._sizes = samples, sizes_of(samples)
        self._task, self._crop, self._batch_size = task, crop, batch_size
        self._seed, self._augmentation, self._rare = seed, augmentation, rare
        weights = np.array([height * width if task == "segment" else 1 for height, width in self._sizes], dtype=np.float64)
        self._edges = np.cumsum(weights) / weights.sum()
        self._cells = class_cells(samples) if rare > 0 and task == "segment" else []

    def batch(self, step: int) -> Batch:
        """Images uint8 (B, C, H, W), channels last in memory, and targets int64 (B, H, W), or (B,) for `classify`."""
        made = [cut(self._samples[draw.index], draw, self._crop) for draw in self.draws(step)]
        images_BHWC = torch.stack([image_CHW.permute(1, 2, 0) for image_CHW, _ in made])
        return images_BHWC.permute(0, 3, 1, 2), torch.stack([target for _, target in made]).long()

    def draws(self, step: int) -> list[Draw]:
        """The crops of a step: a pure function of the seed and the step."""
        generator = np.random.default_rng((self._seed, step))
        return [self._draw(generator) for _ in range(self._batch_size)]

    def _draw(self, generator: np.random.Generator) -> Draw:
        wanted = self._augmentation
        zoom = math.exp(generator.uniform(math.log(wanted.scale[0]), math.log(wanted.scale[1])))
        if self._cells and generator.random() < self._rare:
            index, row, column = self._rare_pixel(generator)
            side = max(1, round(self._crop / zoom))
            height, width = self._sizes[index]
            top, left = _centred(row, side, height), _centred(column, side, width)
        else:
            index = min(int(np.searchsorted(self._edges, generator.random(), side="right")), len(self._edges) - 1)
            height, width = self._sizes[index]
            side = max(1, round((self._crop if self._task == "segment" else min(height, width)) / zoom))
            if self._task == "classify":
                side = min(side, height, width)
            top, left = _anywhere(generator, side, height), _anywhere(generator, side, width)
        return Draw(
            index=index,
            top=top,
            left=left,
            side=side,
            flip_horizontal=bool(generator.random() < wanted.flip_horizontal),
            flip_vertical=bool(generator.random() < wanted.flip_vertical),
            brightness=1 + float(generator.uniform(-wanted.brightness, wanted.brightness)),
            contrast=1 + float(generator.uniform(-wanted.contrast, wanted.contrast)),
            saturation=1 + float(generator.uniform(-wanted.saturation, wanted.saturation)),
        )

    def _rare_pixel(self, generator: np.random.Generator) -> tuple[int, int, int]:
        """A sample, a row and a column where a class drawn uniformly is found."""
        label, cells = self._cells[generator.integers(len(self._cells))]
        index, cell_row, cell_column = (int(place) for place in cells[generator.integers(len(cells))])
        top, left = cell_row * _CELL, cell_column * _CELL
        places = np.argwhere(self._samples[index].labels[top : top + _CELL, left : left + _CELL] == label)
        row, column = places[generator.integers(len(places))]
        return index, top + int(row), left + int(column)


def cut(sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
    """The crop that was drawn: image uint8 (C, crop, crop), target uint8 (crop, crop), or () for `classify`."""
    image_CHW = torch.from_numpy(_window(sample.image, draw, 0)).permute(2, 0, 1)
    target = torch.tensor(sample.target) if isinstance(sample.target, int) else torch.from_numpy(_window(sample.target, draw, IGNORED))
    if draw.side != crop:
        image_CHW = v2.resize_image(image_CHW, [crop, crop], interpolation=InterpolationMode.BILINEAR, antialias=True)
        if target.ndim:  # "nearest" alone would pick pixels half a step to the upper left of where bilinear looks
            target = v2.resize_image(target[None], [crop, crop], interpolation=InterpolationMode.NEAREST_EXACT)[0]
    if draw.flip_horizontal:
        image_CHW, target = v2.horizontal_flip(image_CHW), v2.horizontal_flip(target) if target.ndim else target
    if draw.flip_vertical:
        image_CHW, target = v2.vertical_flip(image_CHW), v2.vertical_flip(target) if target.ndim else target
    return _relit(image_CHW, draw), target


def _relit(image_CHW: Tensor, draw: Draw) -> Tensor:
    """Brightness for every picture, contrast for grey and colour ones, saturation for colour ones."""
    channels = image_CHW.shape[0]
    if draw.brightness != 1:  # torchvision wants 1 or 3 channels: others go as so many grey pictures
        image_CHW = v2.adjust_brightness(image_CHW[:, None], draw.brightness)[:, 0]
    if draw.contrast != 1 and channels in (1, 3):
        image_CHW = v2.adjust_contrast(image_CHW, draw.contrast)
    if draw.saturation != 1 and channels == 3:
        image_CHW = v2.adjust_saturation(image_CHW, draw.saturation)
    return image_CHW


def class_cells(samples: Sequence[Sample]) -> list[tuple[int, np.ndarray[tuple[int, int], np.dtype[np.int32]]]]:
    """(class, places (n, 3): sample, row and column of every 32 × 32 cell that holds it) of each class that occurs.

    Reads every target once; 12 bytes a cell and class in memory.
    """
    found: dict[int, list[np.ndarray[tuple[int, int], np.dtype[np.int32]]]] = {}
    for index, sample in enumerate(samples):
        labels_HW = sample.labels
        height, width = labels_HW.shape
        padded = np.pad(labels_HW, ((0, -height % _CELL), (0, -width % _CELL)), constant_values=IGNORED)
        grid = padded.reshape(padded.shape[0] // _CELL, _CELL, padded.shape[1] // _CELL, _CELL)
        for label in np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256)[:IGNORED]).tolist():
            places = np.argwhere((grid == label).any(axis=(1, 3)))
            found.setdefault(label, []).append(np.insert(places, 0, index, axis=1).astype(np.int32))
    return [(label, np.concatenate(found[label])) for label in sorted(found)]


def prefetch(crops: Batches, start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, Batch]]:
    """(step, batch) of the steps from `start` to before `stop`, made ahead by one background thread, at most `depth` of them.

    `for step, (images, targets) in prefetch(crops, 0, steps): ...`. The thread starts with the first batch asked for and has
    ended when the loop has, by its end, `break` or an error, within the time of one batch. Whoever keeps the iterator in a
    variable closes it (`contextlib.closing`). An error in the thread is raised where its batch is asked for.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="muntin-prefetch") as pool:
        pool.submit(_take_one_core).result()
        # PyTorch keeps one number a thread and one for threads that have not computed yet: give the latter back.
        torch.set_num_threads(threads)
        pending: deque[Future[Batch]] = deque()
        following = start
        try:
            for step in range(start, stop):
                while following < stop and len(pending) < depth:
                    pending.append(pool.submit(crops.batch, following))
                    following += 1
                yield step, pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _take_one_core() -> None:
    """Of the thread that calls it. Not only for its own sake: with a second team of threads on the cores OpenMP lets them all sleep between
    any two loops of a training step, and waking them took a third of its time (docs/log.md)."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number over when it first asks: now, and not when it is another one again


def calibration_batches(
    samples: Sequence[Sample], *, crop: int, count: int, batch_size: int, seed: int, task: DataTask = "segment"
) -> list[Tensor]:
    """`count` training crops without augmentation, uint8 (B, C, crop, crop), in batches of `batch_size`, the last one smaller."""
    return list(each_calibration_batch(samples, crop=crop, count=count, batch_size=batch_size, seed=seed, task=task))


def each_calibration_batch(
    samples: Sequence[Sample], *, crop: int, count: int, batch_size: int, seed: int, task: DataTask = "segment"
) -> Iterator[Tensor]:
    """The same, one after the other: for whoever needs no more than one at a time."""
    crops = Crops(samples, task=task, crop=crop, batch_size=batch_size, seed=seed)
    for step, (images, _) in prefetch(crops, 0, math.ceil(count / batch_size)):
        yield images[: count - step * batch_size]


def _window(array: UInt8, draw: Draw, fill: int) -> UInt8:
    """A copy of the window; what lies outside the array is `fill`."""
    height, width = array.shape[:2]
    rows = slice(max(0, draw.top), min(height, draw.top + draw.side))
    columns = slice(max(0, draw.left), min(width, draw.left + draw.side))
    inside = array[rows, columns]
    if inside.shape[:2] == (draw.side, draw.side):
        return inside.copy()
    window = np.full((draw.side, draw.side, *array.shape[2:]), fill, dtype=np.uint8)
    window[rows.start - draw.top : rows.stop - draw.top, columns.start - draw.left : columns.stop - draw.left] = inside
    return window


def _anywhere(generator: np.random.Generator, side: int, length: int) -> int:
    """Where a window begins: inside the picture, or so that the whole picture lies inside the window."""
    return int(generator.integers(min(0, length - side), max(0, length - side) + 1))


def _centred(place: int, side: int, length: int) -> int:
    """The window around a place, moved as little as it takes to keep it in the picture, or the picture in it."""
    return min(max(place - side // 2, min(0, length - side)), max(0, length - side))
