"""The user's own pictures, read from folders. The validation and test splits have their own, or are shares of the training folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from muntin.artifact.answers import ANSWERS, Task
from muntin.data.items import ItemSource
from muntin.data.source import SPLITS
from muntin.data.splits import check_disjoint, empty_split_error, split_of
from muntin.errors import DataError
from muntin.tasks.answers import ANSWERING
from muntin.tasks.classes import class_infos
from muntin.tasks.folders import FolderPair, PictureListing, SplitName, folders_apart
from muntin.tasks.reading import ReadingSettings
from muntin.tasks.samples import Item


class FolderSource(ItemSource):
    """A `Source` that reads folders. The constructor lists the folders and reads no picture.

    `base` holds the training pictures. `validation` and `test` are folders of their own, or shares (0-1) of the pictures in `base`.
    `reading`: of the files; its classes are by default those that the folders name; other folders, and classes without pictures in
    validation or test, are noted. Names are compared in Unicode's form NFC. `listing`: what is left out; it collects notes and failures. At
    most `cache_bytes` of decoded pictures are kept in memory.

    Raises DataError: a folder is missing or empty, a split is empty, a picture is in two splits, classes and folders differ. Pictures
    without a mask, and two with one stem, are refused by `check`, which names files that cannot be read with them, and by `split`.
    """

    def __init__(
        self,
        task: Task,
        *,
        base: FolderPair,
        validation: FolderPair | float,
        test: FolderPair | float,
        reading: ReadingSettings,
        seed: int = 0,
        listing: PictureListing | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(task, channels=reading.channels, listing=listing or PictureListing())
        others: dict[SplitName, FolderPair | float] = {"validation": validation, "test": test}
        self.listing.apart = folders_apart(base, [pair for pair in others.values() if isinstance(pair, FolderPair)])
        self._classes_given = bool(reading.classes)
        specs = reading.classes or ANSWERING[task].folders.named_classes(base)
        self.classes = class_infos(specs, task) if ANSWERS[task].has_classes else ()
        items = self._split_items(base, others, seed)
        self._finish(items, ANSWERING[task].folders.reader(reading), cache_bytes)

    def _items(self, pair: FolderPair, split: SplitName = "train") -> list[Item]:
        """The items in the folders of a split; `train` means the base folder."""
        return ANSWERING[self.task].folders.items(self.listing, pair, split, self.classes, given=self._classes_given)

    def _split_items(self, base: FolderPair, others: Mapping[SplitName, FolderPair | float], seed: int) -> dict[SplitName, list[Item]]:
        shares = {name: other for name, other in others.items() if isinstance(other, float | int)}
        base_items = self._items(base)
        splits: dict[SplitName, list[Item]] = {name: [] for name in SPLITS}
        for item in base_items:
            splits[split_of(item.key, seed, shares)].append(item)
        if ANSWERS[self.task].one:
            self._note_absent_classes({name: splits[name] for name in shares})
        for name, other in others.items():
            if isinstance(other, FolderPair):
                for key in ("masks", "targets"):
                    if (getattr(other, key) is None) != (getattr(base, key) is None):
                        raise DataError(f"`{name}` must name {key} exactly where the training images have {key}")
                splits[name] = self._items(other, name)
        for name, items in splits.items():
            if not items and self.listing.failures:
                raise self.listing.failure_error(self.listing.failures)
            if not items:
                raise empty_split_error(name, [item.key for item in base_items], base.images, seed, shares)
        check_disjoint({name: [item.image for item in items if isinstance(item.image, Path)] for name, items in splits.items()})
        return splits
