"""Pictures with their targets in files, and a source of them: what folders and shards share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from muntin.artifact.answers import ANSWERS, Task
from muntin.artifact.classes import ClassInfo
from muntin.data.source import SPLITS, CheckProgress, SampleCache, Samples
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.rasters import OpenRasters
from muntin.tasks.answers import ANSWERING
from muntin.tasks.folders import MAX_FAILURES, Failure, PictureListing, SplitName
from muntin.tasks.reading import Reader
from muntin.tasks.samples import Item, Sample
from muntin.text import list_some


class ItemSource:
    """A `Source` of items. Its subclasses set `classes`, and call `_finish` with the items of each split."""

    classes: tuple[ClassInfo, ...]

    def __init__(self, task: Task, *, channels: int, listing: PictureListing) -> None:
        self.task: Task = task
        self.channels = channels
        self.listing = listing

    def _finish(self, items: Mapping[SplitName, Sequence[Item]], reader: Reader, cache_bytes: int) -> None:
        self.listing.note_skipped()
        cache = SampleCache(cache_bytes)
        self._splits = {name: ItemSamples(name, items[name], reader, cache) for name in SPLITS}

    @property
    def notes(self) -> tuple[str, ...]:
        """Files and folders that are not used, and classes that a split lacks, one line each."""
        return tuple(self.listing.notes)

    def split(self, name: SplitName) -> Samples:
        """The pictures of a split, in order. Raises DataError for images without a mask and equal stems."""
        if self.listing.failures:
            raise self.listing.failure_error(self.listing.failures)
        return self._splits[name]

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """Decode every image and mask once. Returns a note if no training mask holds a class.

        Raises DataError for pictures that cannot be used (two with one stem, no mask, files that cannot be read); it gives the reason for
        the first one and names the others, up to ten in all.
        """
        total, done = sum(len(samples) for samples in self._splits.values()), 0
        pixels = {name: np.zeros(max(256, len(self.classes)), dtype=np.int64) for name in SPLITS}  # of each label
        failures = dict(self.listing.failures)
        for name, samples in self._splits.items():
            for index, item in enumerate(samples.items):
                if len(failures) >= MAX_FAILURES:
                    raise self.listing.failure_error(failures)
                try:
                    pixels[name] += ANSWERING[self.task].folders.label_counts(samples[index], len(pixels[name]))
                except DataError as error:
                    failures[item.image] = Failure(str(error))
                done += 1
                if progress is not None:
                    progress(done, total)
        if failures:
            raise self.listing.failure_error(failures)
        for name in SPLITS:
            if ANSWERS[self.task].masks and not pixels[name][:IGNORED].any():
                raise DataError(
                    f"every pixel of the masks of the {name} split is ignored, so nothing can be learned or scored: "
                    "correct the masks, or set `ignore` to another value"
                )
        absent = [entry.name for index, entry in enumerate(self.classes) if not pixels["train"][index]]
        return (f"no training picture holds {list_some(absent)}: a model cannot learn what it does not see",) if absent else ()

    def _note_absent_classes(self, splits: Mapping[SplitName, Sequence[Item]]) -> None:
        for name, items in splits.items() if self.classes else ():
            labels = {item.target for item in items}
            absent = [entry.name for label, entry in enumerate(self.classes) if label not in labels]
            if items and absent:
                self.listing.notes.append(
                    f"the {name} split has no picture of {list_some(absent)}, so its score says nothing about it: add pictures, or change "
                    "`data.seed`"
                )


class ItemSamples(Samples):
    """The pictures of a split, decoded on access."""

    def __init__(self, split: SplitName, items: Sequence[Item], reader: Reader, cache: SampleCache) -> None:
        self._split, self.items, self._reader, self._cache = split, items, reader, cache
        self._sizes: list[tuple[int, int]] | None = None
        self._files = OpenRasters()

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Sample:
        item = self.items[index]
        return self._cache.get((self._split, index), lambda: self._reader.read(item, self._files))

    def names(self) -> Sequence[str]:
        return [item.key for item in self.items]

    def sizes(self) -> Sequence[tuple[int, int]]:
        if self._sizes is None:
            self._sizes = [self._reader.size(item) for item in self.items]
        return self._sizes


def class_counts(samples: Sequence[Sample], classes: int, task: Task) -> npt.NDArray[np.int64]:
    """The number of pixels, or of pictures, of each class `(classes,)`. Reads every sample once."""
    counts = np.zeros(max(256, classes), dtype=np.int64)
    for sample in samples:
        counts += ANSWERING[task].folders.label_counts(sample, len(counts))
    return counts[:classes]
