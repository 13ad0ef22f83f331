"""Pictures with their targets in files, and a source of them: what folders and shards share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from muntin.artifact.classes import ClassInfo
from muntin.data.classes import MaskMapping, list_some
from muntin.data.source import SPLITS, CheckProgress, DataTask, Sample, SampleCache, Samples, SplitName
from muntin.errors import DataError
from muntin.images import IGNORED, image_size, read_image, read_mask
from muntin.images.listing import composed
from muntin.images.opening import PictureFile, UInt8
from muntin.images.rasters import OpenRasters, Raster, bands, is_windowed, mask_raster, picture_raster, tiff_header

_MAX_FAILURES = 10  # pictures that cannot be used, after which a check stops


@dataclass(frozen=True, kw_only=True)
class Item:
    """The files of one picture."""

    key: str  # decides the split: the stem, for `classify` the class's folder and the stem; in a shard the name of the entry
    image: PictureFile
    mask: PictureFile | None = None
    label: int = -1


@dataclass(frozen=True)
class Failure:
    """Why a picture cannot be used. `short`: the same in two or three words, empty for a file that cannot be read."""

    reason: str
    short: str = ""


class ItemSource:
    """A `Source` of items. Its subclasses set `classes`, notes and failures, and call `_finish` with the items of each split."""

    classes: tuple[ClassInfo, ...]

    def __init__(self, task: DataTask, *, channels: int, skip: Sequence[Path], root: Path | None) -> None:
        self.task: DataTask = task
        self.channels = channels
        self._notes: list[str] = []
        self._skip = {_normal(path): path for path in skip}
        self._skipped: set[str] = set()  # keys of `skip` that name a picture
        self._root = root
        self._absent = ""
        """A note on keys of `skip` that name no picture."""
        self._failures: dict[PictureFile, Failure] = {}  # pictures that the names of the files alone rule out

    def _finish(self, items: Mapping[SplitName, Sequence[Item]], mapping: MaskMapping | None, cache_bytes: int) -> None:
        self._note_skipped()
        cache = SampleCache(cache_bytes)
        self._splits = {name: ItemSamples(name, items[name], self.channels, mapping, cache) for name in SPLITS}

    @property
    def notes(self) -> tuple[str, ...]:
        """Files and folders that are not used, and classes that a split lacks, one line each."""
        return tuple(self._notes)

    def split(self, name: SplitName) -> Samples:
        """The pictures of a split, in order. Raises DataError for images without a mask and equal stems."""
        if self._failures:
            raise self._failure_error(self._failures)
        return self._splits[name]

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """Decode every image and mask once. Returns a note if no training mask holds a class.

        Raises DataError for pictures that cannot be used (two with one stem, no mask, files that cannot be read); it gives the reason for
        the first one and names the others, up to ten in all.
        """
        total, done = sum(len(samples) for samples in self._splits.values()), 0
        pixels = {name: np.zeros(max(256, len(self.classes)), dtype=np.int64) for name in SPLITS}  # of each label
        failures = dict(self._failures)
        for name, samples in self._splits.items():
            for index, item in enumerate(samples.items):
                if len(failures) >= _MAX_FAILURES:
                    raise self._failure_error(failures)
                try:
                    pixels[name] += _label_counts(samples[index], len(pixels[name]))
                except DataError as error:
                    failures[item.image] = Failure(str(error))
                done += 1
                if progress is not None:
                    progress(done, total)
        if failures:
            raise self._failure_error(failures)
        for name in SPLITS:
            if self.task == "segment" and not pixels[name][:IGNORED].any():
                raise DataError(
                    f"every pixel of the masks of the {name} split is ignored, so nothing can be learned or scored: "
                    "correct the masks, or set `ignore` to another value"
                )
        absent = [entry.name for index, entry in enumerate(self.classes) if not pixels["train"][index]]
        return (f"no training picture holds {list_some(absent)}: a model cannot learn what it does not see",) if absent else ()

    def _note_absent_classes(self, splits: Mapping[SplitName, Sequence[Item]]) -> None:
        for name, items in splits.items():
            labels = {item.label for item in items}
            absent = [entry.name for label, entry in enumerate(self.classes) if label not in labels]
            if items and absent:
                self._notes.append(
                    f"the {name} split has no picture of {list_some(absent)}, so its score says nothing about it: add pictures, or change "
                    "`data.seed`"
                )

    def _is_skipped(self, path: PictureFile) -> bool:
        """Return True for a picture that `skip` names."""
        key = _normal(path)
        if key in self._skip:
            self._skipped.add(key)
        return key in self._skip

    def _note_skipped(self) -> None:
        root = self._root
        shown = {key: path if root is None or root not in path.parents else path.relative_to(root) for key, path in self._skip.items()}
        if self._skipped:
            self._notes.append(f"left out by data.skip: {list_some([path for key, path in shown.items() if key in self._skipped], 3)}")
        absent = [path for key, path in shown.items() if key not in self._skipped]
        if absent:
            self._absent = f"data.skip names {list_some(absent, 3)}, which is not among the pictures: give paths from the recipe's folder"
            self._notes.append(self._absent)

    def _failure_error(self, failures: Mapping[PictureFile, Failure]) -> DataError:
        """The error for pictures that cannot be used: the reason for the first one, and the names of the others, up to ten in all."""
        (_, first), *others = islice(failures.items(), _MAX_FAILURES)
        absent = f" ({self._absent})" if self._absent else ""
        if not others:
            return DataError(f"{first.reason}, or name it under data.skip: {self._named(next(iter(failures)))}{absent}")
        names = ", ".join(f"{self._named(path)}{failure.short and f' ({failure.short})'}" for path, failure in others)
        number = f"{_MAX_FAILURES} or more" if len(failures) >= _MAX_FAILURES else f"{len(failures)}"
        return DataError(
            f"{first.reason}; {number} pictures cannot be used, also {names}: correct them, or name them under data.skip{absent}"
        )

    def _named(self, file: PictureFile) -> str:
        """The name of a picture as data.skip takes it: from the recipe's folder."""
        if not isinstance(file, Path):
            return f"{file.file.name}/{file.name}"
        return str(file if self._root is None or self._root not in file.parents else file.relative_to(self._root))


class ItemSamples(Samples):
    """The pictures of a split, decoded on access."""

    def __init__(self, split: SplitName, items: Sequence[Item], channels: int, mapping: MaskMapping | None, cache: SampleCache) -> None:
        self._split, self.items, self._channels, self._mapping, self._cache = split, items, channels, mapping, cache
        self._sizes: list[tuple[int, int]] | None = None
        self._files = OpenRasters()

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Sample:
        item = self.items[index]
        return self._cache.get((self._split, index), lambda: read_sample(item, self._channels, self._mapping, self._files))

    def names(self) -> Sequence[str]:
        return [item.key for item in self.items]

    def sizes(self) -> Sequence[tuple[int, int]]:
        if self._sizes is None:
            self._sizes = [_size(item) for item in self.items]
        return self._sizes


def class_counts(samples: Sequence[Sample], classes: int) -> npt.NDArray[np.int64]:
    """The number of pixels, or of pictures, of each class `(classes,)`. Reads every sample once."""
    counts = np.zeros(max(256, classes), dtype=np.int64)
    for sample in samples:
        counts += _label_counts(sample, len(counts))
    return counts[:classes]


def _label_counts(sample: Sample, length: int) -> npt.NDArray[np.int64]:
    """The number of pixels of each label, 0 for `restore`. Reads a raster once, its picture too."""
    counts = np.zeros(length, dtype=np.int64)
    if sample.restores:
        return counts
    if isinstance(sample.image, Raster):
        for _ in bands(sample.image):
            pass
    for _, labels in [(0, np.array(sample.target))] if isinstance(sample.target, int) else bands(sample.target):
        counts += np.bincount(labels.ravel(), minlength=length)
    return counts


def _normal(path: PictureFile) -> str:
    """A path for comparisons: without "..", in Unicode's form NFC."""
    return composed(os.path.normpath(str(path)))


def _size(item: Item) -> tuple[int, int]:
    """(height, width) of a picture, from its header."""
    header = tiff_header(item.image) if item.mask is not None and is_windowed(item.image) else None
    return image_size(item.image) if header is None else (header.height, header.width)


def read_sample(item: Item, channels: int, mapping: MaskMapping | None, files: OpenRasters) -> Sample:
    """Decode one picture and its target; a large TIFF with a mask, or of a mask, is not decoded, but read by window.

    Raises DataError: a damaged file, sizes that differ, a mask value of no class. `files`: where rasters are kept open.
    """
    if mapping is not None and is_windowed(item.image):
        image_HWC: UInt8 | Raster = picture_raster(item.image, files, channels)
    else:
        image_HWC = read_image(item.image, channels)
    target: UInt8 | Raster | int = item.label
    if mapping is not None and item.mask is not None:
        header = tiff_header(item.mask)
        convert = partial(mapping, path=item.mask, nodata=None if header is None else header.nodata)
        mask = mask_raster(item.mask, files, convert) if is_windowed(item.mask) else read_mask(item.mask, colors=mapping.colors)
        if mask.shape[:2] != image_HWC.shape[:2]:
            (height, width), (mask_height, mask_width) = image_HWC.shape[:2], mask.shape[:2]
            rotated = (width, height) == (mask_height, mask_width)
            raise DataError(
                f"{item.image} is {width}×{height} and its mask {item.mask} {mask_width}×{mask_height}: they must be of one size"
                + ("; the image is rotated by its EXIF orientation: rotate the mask, too" if rotated else "")
            )
        target = mask if isinstance(mask, Raster) else convert(mask)
    return Sample(name=item.key, image=image_HWC, target=target)
