"""Folders of classes: how they are found and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import image_size, read_image
from muntin.images.listing import FOLDER_NAMES, composed, holds_results, is_results_folder, is_utf8, pictures, pictures_below, subfolders
from muntin.images.opening import PictureFile
from muntin.images.rasters import OpenRasters
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import EXPECTED, FolderPair, Layout, PictureListing, SplitFolders, SplitName
from muntin.tasks.reading import Reader, ReadingSettings, TaskFolders
from muntin.tasks.samples import Item, Sample
from muntin.text import list_some

EMPTY_MARK = ".no-pictures"
"""A file in the folder of a class that has no training images on purpose; updates write it."""


class ClassReader(Reader):
    """Reads pictures of a class."""

    def read(self, item: Item, files: OpenRasters) -> Sample:
        return Sample(name=item.key, image=read_image(item.image, self.reading.channels), target=item.target)

    def size(self, item: Item) -> tuple[int, int]:
        return image_size(item.image)


def class_items(listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool) -> list[Item]:
    """The pictures of the classes. `given`: the recipe names the classes, and other folders are left out.

    Raises DataError for folders that differ from the classes. Those of the split `train` must hold every class.
    """
    names = [composed(entry.name) for entry in classes]
    folders = class_folders(pair.images)
    absent = [name for name in names if name not in folders]
    unnamed = sorted(set(folders) - set(names))
    if (absent and split == "train") or (not given and not all(is_results_folder(folders[name]) for name in unnamed)):
        raise DataError(
            f"{pair.images} holds the folders {list_some(sorted(folders))}, the classes are {list_some(names)}: "
            f"{list_some(sorted([*absent, *unnamed]))} differ; rename a folder, or name the classes to learn under `classes`"
        )
    if unnamed:
        listing.notes.append(f"{pair.images}: the folders {list_some(unnamed)} are not classes of the recipe and are not used")
    items: list[Item] = []
    for label, name in enumerate(names):
        required = split == "train" and name in folders and not (folders[name] / EMPTY_MARK).is_file()
        found = listing.pictures_below(folders[name], required=required) if name in folders else {}
        used = {place: path for place, path in found.items() if not listing.is_skipped(path)}
        items += [Item(key=f"{folders[name].name}/{place}{path.stem}", image=path, target=label) for (place, _), path in used.items()]
        if not used and name not in absent:
            absent.append(name)
    if not items:
        raise DataError(f"{pair.images} holds no image of a class: put images into its class folders")
    if absent:
        listing.notes.append(f"{pair.images}: no picture of {list_some(absent)}, so the {split} score says nothing about it")
    return items


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders in `folder` by name in form NFC. Raises DataError: none, a name that is not UTF-8, a name in two spellings."""
    folders = subfolders(folder)
    if not folders:
        raise DataError(f"{folder} holds no folders: for `classify` put the images of each class into a folder of its name")
    by_name: dict[str, Path] = {}
    for path in folders:
        if not is_utf8(path.name):
            raise DataError(f"{str(path)!a}: a class has the name of its folder, and this name is not valid UTF-8: rename the folder")
        if by_name.setdefault(composed(path.name), path) is not path:
            raise DataError(f"{folder} holds {path.name!r} twice, with its accents encoded in two ways: put the images into one folder")
    return by_name


def class_layout(base: Path, split_folders: SplitFolders, *, task_given: bool) -> Layout | None:
    class_folders = folders_of_classes(base, deep=task_given)
    if len(class_folders) < 2:
        return None
    names = {name for role in FOLDER_NAMES if role != "targets" for name in FOLDER_NAMES[role]}  # "clean" and "sharp" are classes, too
    reserved = next((folder for folder in class_folders if folder.name.lower() in names), None)
    if reserved is not None and not task_given:
        raise DataError(
            f"{reserved} has the name of a split, of images or of masks, and lies beside folders that do not fit it: {EXPECTED}; if it is "
            "a class, use --task classify"
        )
    splits = {name: None if folder is None else FolderPair(images=folder) for name, folder in split_folders.items()}
    return Layout(
        task="classify", base=FolderPair(images=base), validation=splits.get("validation"), test=splits.get("test"), deep=task_given
    )  # fmt: skip


def folders_of_classes(base: Path, *, deep: bool) -> list[Path]:
    """The folders in `base` that hold pictures, `deep`: or whose folders below do."""
    return [folder for folder in subfolders(base) if pictures(folder) or (deep and not holds_results(folder) and pictures_below(folder))]


def nested_class_notes(base: Path) -> list[str]:
    """A note for each folder beside class folders that holds no pictures while its subfolders do. The results folder is left out."""
    notes = []
    for folder in subfolders(base):
        inner = [subfolder.name for subfolder in subfolders(folder) if pictures(subfolder)]
        if inner and not pictures(folder) and not is_results_folder(folder):
            only = f"only its subfolders ({list_some(inner, 3)}) hold pictures"
            notes.append(f"{folder.name} is not a class: {only}; if it is a class, run init with --task classify, without this recipe")
    return notes


class ClassFolders(TaskFolders):
    """A folder of pictures for each class."""

    def layout(self, root: Path, base: Path, split_folders: SplitFolders, *, given: bool) -> Layout | None:
        """Beside class folders a folder called `test` may be a class: only the folders beside `train` are splits."""
        return class_layout(base, {} if base is root else split_folders, task_given=given)

    def training_pictures(self, layout: Layout) -> Mapping[str, PictureFile]:
        folders = folders_of_classes(layout.base.images, deep=layout.deep)
        return {f"{folder.name}/{name}": path for folder in folders for path, name in pictures_below(folder).items()}

    def named_classes(self, pair: FolderPair) -> list[ClassSpec]:
        return [ClassSpec(name=folder.name) for folder in class_folders(pair.images).values() if not is_results_folder(folder)]

    def items(
        self, listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool
    ) -> list[Item]:
        return class_items(listing, pair, split, classes, given=given)

    def reader(self, reading: ReadingSettings) -> ClassReader:
        return ClassReader(reading)

    def label_counts(self, sample: Sample, length: int) -> NDArray[np.int64]:
        return np.bincount([sample.target], minlength=length)
