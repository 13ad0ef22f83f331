"""Pictures whose number is the first part of their names: 12-street.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from muntin.artifact import ClassInfo
from muntin.images import image_size, read_image
from muntin.images.listing import pictures_below
from muntin.images.opening import PictureFile
from muntin.images.rasters import OpenRasters
from muntin.tasks.folders import FolderPair, Layout, PictureListing, SplitFolders, SplitName
from muntin.tasks.reading import Reader, ReadingSettings, TaskFolders
from muntin.tasks.samples import Item, Sample


class NumberReader(Reader):
    def read(self, item: Item, files: OpenRasters) -> Sample:
        return Sample(name=item.key, image=read_image(item.image, self.reading.channels), target=item.target)

    def size(self, item: Item) -> tuple[int, int]:
        return image_size(item.image)


class NumberFolders(TaskFolders):
    guessed: ClassVar = False

    def layout(self, root: Path, base: Path, split_folders: SplitFolders, *, given: bool) -> Layout | None:
        if not pictures_below(root):
            return None
        return Layout(task="count", base=FolderPair(images=root), validation=None, test=None)  # type: ignore[arg-type]

    def training_pictures(self, layout: Layout) -> Mapping[str, PictureFile]:
        return {name: path for path, name in pictures_below(layout.base.images).items()}

    def items(
        self, listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool
    ) -> list[Item]:
        found = listing.pictures_below(pair.images, required=True)
        return [
            Item(key=f"{place}{stem}", image=path, target=np.array([float(stem.partition("-")[0])], np.float32))
            for (place, stem), path in found.items()
        ]

    def reader(self, reading: ReadingSettings) -> NumberReader:
        return NumberReader(reading)
