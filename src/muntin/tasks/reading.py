"""The seams of a task's files: its folders, and what reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import ClassInfo
from muntin.images import IGNORED
from muntin.images.opening import PictureFile, UInt8
from muntin.images.rasters import OpenRasters
from muntin.tasks.classes import RGB, UNKNOWN_VALUE, ClassSpec
from muntin.tasks.folders import FolderPair, Layout, PictureListing, SplitFolders, SplitName
from muntin.tasks.samples import Item, Sample


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How the section `data` of a recipe says that files are read.

    `ignore`: mask value or colour of pixels that belong to no class. `unknown`: advice for a value of no class. `degrade`: makes the
    pictures from clean ones. `scale`: sides of clean pictures over those of inputs.
    """

    channels: int = 3
    classes: Sequence[ClassSpec] = ()
    ignore: int | RGB | None = IGNORED
    unknown: str = UNKNOWN_VALUE
    degrade: Callable[[UInt8, np.random.Generator], UInt8] | None = None
    scale: int = 1


class Reader(ABC):
    """Reads samples. Raises DataError for what cannot be used."""

    def __init__(self, reading: ReadingSettings) -> None:
        self.reading = reading

    @abstractmethod
    def read(self, item: Item, files: OpenRasters) -> Sample:
        """Decode a picture and its target. `files`: where rasters are kept open."""

    @abstractmethod
    def size(self, item: Item) -> tuple[int, int]:
        """Return (height, width) of a picture, from its header."""


class TaskFolders(ABC):
    """Folders of a task: how they are found, listed and read.

    `keys`: of a recipe's section `data` that no other task has; with folders one of them is needed, which `needs` says. `guessed`:
    `muntin init` looks for the task's folders without being told.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = ""
    guessed: ClassVar[bool] = True

    @abstractmethod
    def layout(self, root: Path, base: Path, split_folders: SplitFolders, *, given: bool) -> Layout | None:
        """Return the folders in `base`, `root` or its folder `train`, that a recipe can name; None without any.

        `split_folders`: those of validation and test in `root`. `given`: the task is known. Raises DataError for folders that contradict.
        """

    @abstractmethod
    def training_pictures(self, layout: Layout) -> Mapping[str, PictureFile]:
        """Return the training pictures by the key of their `Item`."""

    def named_classes(self, pair: FolderPair) -> list[ClassSpec]:
        """Return the classes that the folders name."""
        return []

    @abstractmethod
    def items(
        self, listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool
    ) -> list[Item]:
        """Return the items in the folders of a split. `given`: the recipe names the classes. Raises DataError for missing folders."""

    @abstractmethod
    def reader(self, reading: ReadingSettings) -> Reader:
        """Return what reads the items."""

    def label_counts(self, sample: Sample, length: int) -> NDArray[np.int64]:
        """Return how many items of a sample have each label, (length,)."""
        return np.zeros(length, dtype=np.int64)
