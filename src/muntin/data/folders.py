"""The user's own pictures, read from folders.

`segment`: a folder of images and a folder of masks, matched by stem (`a.jpg` and `a.png`), also in subfolders of the same names.
`classify`: a folder that holds one folder of images for each class, also in subfolders of it. The validation and test splits have their
own folders, or are shares of the training folder (`splits`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from muntin.data.classes import RGB, UNKNOWN_VALUE, ClassSpec, MaskMapping, class_infos, list_some
from muntin.data.items import Failure, Item, ItemSource
from muntin.data.section import Section
from muntin.data.source import SPLITS, SplitName
from muntin.data.splits import check_disjoint, empty_split_error, split_of
from muntin.errors import DataError
from muntin.images import IGNORED, IMAGE_SUFFIXES
from muntin.images.listing import (
    composed,
    entries,
    folders_below,
    is_picture,
    is_results_folder,
    is_utf8,
    paired_folders,
    pictures,
    subfolders,
)
from muntin.text import count

RECIPE_NAME = "recipe.yaml"
"""The file that `muntin init` writes; it may lie beside the images."""
EMPTY_MARK = ".no-pictures"
"""A file in the folder of a class that has no training images on purpose; updates write it."""


class FolderPair(Section):
    """The folders of a split: images, and for segmentation masks with the same stems."""

    images: Path = Field(
        description="folder of images, subfolders too; for `classify` it holds a folder for each class, and classes may be missing"
    )
    masks: Path | None = Field(default=None, description="folder of masks, with the same subfolders; `segment` only")
    targets: Path | None = Field(default=None, description="folder of clean pictures; `restore` with data.targets only")

    def under(self, root: Path) -> FolderPair:
        """The same folders, with relative paths resolved against `root`."""
        masks, targets = (None if folder is None else root / folder for folder in (self.masks, self.targets))
        return FolderPair(images=root / self.images, masks=masks, targets=targets)


class FolderSource(ItemSource):
    """A `Source` that reads folders. The constructor lists the folders and reads no picture.

    `base` holds the training pictures. `validation` and `test` are folders of their own, or shares (0-1) of the pictures in `base`.
    With masks the task is `segment`. Without masks it is `classify`, and `classes` names folders in `base`, by default all of them; other
    folders, and classes without pictures in validation or test, are noted. Names are compared in Unicode's form NFC. `ignore`: mask value
    or colour of pixels that belong to no class. `skip`: images, or masks of images, that are left out and noted, with paths that
    start at `root` where they lie in it. At most `cache_bytes` of decoded pictures are kept in memory.

    Raises DataError: a folder is missing or empty, a split is empty, a picture is in two splits, classes and folders differ. Pictures
    without a mask, and two with one stem, are refused by `check`, which names files that cannot be read with them, and by `split`.
    """

    _unknown_value = UNKNOWN_VALUE

    def __init__(
        self,
        *,
        base: FolderPair,
        validation: FolderPair | float,
        test: FolderPair | float,
        classes: Sequence[ClassSpec] = (),
        ignore: int | RGB | None = IGNORED,
        channels: int = 3,
        seed: int = 0,
        skip: Sequence[Path] = (),
        root: Path | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__("classify" if base.masks is None else "segment", channels=channels, skip=skip, root=root)
        self._classes_given = bool(classes)
        if self.task == "classify" and not classes:
            classes = [ClassSpec(name=folder.name) for folder in class_folders(base.images).values() if not is_results_folder(folder)]
        self.classes = class_infos(classes, self.task)
        items = self._split_items(base, {"validation": validation, "test": test}, seed)
        self._finish(items, None if base.masks is None else MaskMapping(classes, ignore, self._unknown_value), cache_bytes)

    def _split_items(self, base: FolderPair, others: Mapping[SplitName, FolderPair | float], seed: int) -> dict[SplitName, list[Item]]:
        shares = {name: other for name, other in others.items() if isinstance(other, float | int)}
        base_items = self._items(base)
        splits: dict[SplitName, list[Item]] = {name: [] for name in SPLITS}
        for item in base_items:
            splits[split_of(item.key, seed, shares)].append(item)
        if self.task == "classify":
            self._note_absent_classes({name: splits[name] for name in shares})
        for name, other in others.items():
            if isinstance(other, FolderPair):
                if (other.masks is None) != (base.masks is None):
                    raise DataError(f"`{name}` must name masks exactly where the training images have masks")
                splits[name] = self._items(other, name)
        for name, items in splits.items():
            if not items and self._failures:
                raise self._failure_error(self._failures)
            if not items:
                raise empty_split_error(name, [item.key for item in base_items], base.images, seed, shares)
        check_disjoint({name: [item.image for item in items if isinstance(item.image, Path)] for name, items in splits.items()})
        return splits

    def _items(self, pair: FolderPair, split: SplitName = "train") -> list[Item]:
        """The items in the folders of a split; `train` means the base folder, which must hold every class."""
        if pair.masks is not None:
            return self._image_mask_items(pair.images, pair.masks)
        names = [composed(entry.name) for entry in self.classes]
        folders = class_folders(pair.images)
        absent = [name for name in names if name not in folders]
        unnamed = sorted(set(folders) - set(names))
        if (absent and split == "train") or (not self._classes_given and not all(is_results_folder(folders[name]) for name in unnamed)):
            raise DataError(
                f"{pair.images} holds the folders {list_some(sorted(folders))}, the classes are {list_some(names)}: "
                f"{list_some(sorted([*absent, *unnamed]))} differ; rename a folder, or name the classes to learn under `classes`"
            )
        if unnamed:
            self._notes.append(f"{pair.images}: the folders {list_some(unnamed)} are not classes of the recipe and are not used")
        items: list[Item] = []
        for label, name in enumerate(names):
            required = split == "train" and name in folders and not (folders[name] / EMPTY_MARK).is_file()
            found = self._pictures_below(folders[name], required=required) if name in folders else {}
            used = {place: path for place, path in found.items() if not self._is_skipped(path)}
            items += [Item(key=f"{folders[name].name}/{place}{path.stem}", image=path, label=label) for (place, _), path in used.items()]
            if not used and name not in absent:
                absent.append(name)
        if not items:
            raise DataError(f"{pair.images} holds no image of a class: put images into its class folders")
        if absent:
            self._notes.append(f"{pair.images}: no picture of {list_some(absent)}, so the {split} score says nothing about it")
        return items

    def _image_mask_items(self, image_folder: Path, mask_folder: Path) -> list[Item]:
        places = paired_folders(image_folder, mask_folder)
        items: list[Item] = []
        for place, images, masks in places:
            items += self._items_at(place, images, masks, {name.partition("/")[0] for name in _below(place, places)})
        for folder, inside in ((image_folder, [images for _, images, _ in places]), (mask_folder, [masks for *_, masks in places])):
            if not any(pictures(path) for path in inside):
                raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        return items

    def _items_at(self, place: str, image_folder: Path, mask_folder: Path, used: Collection[str]) -> list[Item]:
        """The items of one folder of images and its folder of masks. `used`: the names of their subfolders that are read, too."""
        images, masks = (self._pictures_by_stem(folder, required=False, used=used) for folder in (image_folder, mask_folder))
        unused = [path.name for stem, path in masks.items() if stem not in images]
        for stem in [stem for stem in images if self._is_skipped(images[stem]) or (stem in masks and self._is_skipped(masks[stem]))]:
            del images[stem]
        for stem in [stem for stem in images if stem not in masks]:
            path = images.pop(stem)
            self._failures[path] = Failure(f"{path} has no mask: add {mask_folder / path.stem}.png or remove the image", "no mask")
        if unused:
            self._notes.append(f"{mask_folder}: {count(len(unused), 'mask')} without an image, not used: {list_some(unused, 3)}")
        return [Item(key=f"{place}/{path.stem}".lstrip("/"), image=path, mask=masks[stem]) for stem, path in images.items()]

    def _pictures_below(self, folder: Path, *, required: bool, apart: Collection[Path] = ()) -> dict[tuple[str, str], Path]:
        """The pictures in `folder` and all folders in it, by their place (`2024/`, or empty) and stem. Otherwise as `_pictures_by_stem`."""
        found: dict[tuple[str, str], Path] = {}
        for place, path in folders_below(folder, apart=apart):
            inner = {composed(inside.name) for inside in subfolders(path)}
            for stem, file in self._pictures_by_stem(path, required=False, used=inner).items():
                other = found.setdefault((f"{place}/" if place else "", stem), file)
                if other is not file:  # two folders of one name, with its accents encoded in two ways
                    self._failures[file] = Failure(f"{other} and {file} have the same name: rename or remove one", f"the name of {other}")
        if required and not found:
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        return found

    def _pictures_by_stem(self, folder: Path, *, required: bool = True, used: Collection[str] = ()) -> dict[str, Path]:
        """The pictures in `folder` by stem in form NFC. Notes other entries. Raises DataError if `required` and there are none.

        `used`: names of subfolders, in form NFC, that are read elsewhere.
        """
        found: dict[str, Path] = {}
        other_files, folders = list[str](), list[str]()
        for path in entries(folder):
            stem = composed(path.stem)
            if path.is_dir():
                folders += [] if composed(path.name) in used else [path.name]
            elif not is_picture(path):
                if path.name != RECIPE_NAME:
                    other_files.append(path.name)
            elif stem not in found or self._is_skipped(found[stem]):
                found[stem] = path
            elif not self._is_skipped(path):
                other = found[stem]
                self._failures[path] = Failure(
                    f"{other} and {path.name} have the same stem: rename or remove one", f"the stem of {other.name}"
                )
        if required and not found:
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        if other_files:
            self._notes.append(f"{folder}: {count(len(other_files), 'file')} other than images, not used: {list_some(other_files, 3)}")
        if folders:
            self._notes.append(f"{folder}: the files in its subfolders ({list_some(folders)}) are not used")
        return found


def folders_apart(base: FolderPair, others: Sequence[FolderPair]) -> set[Path]:
    """Resolved folders that may lie inside that of the training pictures and hold others: the clean pictures and the other splits."""
    named = [folder for pair in (base, *others) for folder in (pair.images, pair.masks, pair.targets) if folder is not None]
    return {folder.resolve() for folder in named} - {base.images.resolve()}


def _below(place: str, places: Sequence[tuple[str, Path, Path]]) -> list[str]:
    """The places below a place, relative to it."""
    prefix = f"{place}/" if place else ""
    return [other.removeprefix(prefix) for other, *_ in places if other and other != place and other.startswith(prefix)]


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
