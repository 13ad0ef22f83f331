"""Folders of pictures: what is found in them, and how a recipe names them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from muntin.artifact.answers import ANSWERS, Answer, Task
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES
from muntin.images.listing import composed, entries, folders_below, is_picture, subfolders
from muntin.images.opening import PictureFile
from muntin.section import Section
from muntin.text import count, list_some

RECIPE_NAME = "recipe.yaml"
"""The file that `muntin init` writes; it may lie beside the images."""
SplitName = Literal["train", "validation", "test"]
SplitFolders = Mapping[SplitName, Path | None]
EXPECTED = (
    "expected images/ and masks/ (or train/, val/ and test/ that hold these), or for classification one folder of images for each class, "
    f"with images as {', '.join(IMAGE_SUFFIXES)}; or shards, .tar files that hold 1.jpg with 1.mask.png or 1.cls"
)
MAX_FAILURES = 10
"""Pictures that cannot be used, after which a check stops."""


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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of the training pictures, and of validation and test where these have folders of their own.

    `shards`: the content of the training shards; None for pictures in folders. `deep`: a folder is a class even
    if only folders below it hold pictures.
    """

    task: Task
    base: FolderPair
    validation: FolderPair | None
    test: FolderPair | None
    shards: Any = None
    deep: bool = False

    @property
    def answer(self) -> Answer:
        """Facts of the task."""
        return ANSWERS[self.task]

    def apart(self) -> set[Path]:
        """Resolved folders in that of the training pictures which hold no training pictures."""
        return folders_apart(self.base, [pair for pair in (self.validation, self.test) if pair is not None])


@dataclass(frozen=True)
class Failure:
    """Why a picture cannot be used. `short`: the same in two or three words, empty for a file that cannot be read."""

    reason: str
    short: str = ""


class PictureListing:
    """The pictures of some folders. `skip`: those to leave out, with paths that start at `root` where they lie in it.

    `apart`: folders that may lie inside that of the training pictures and hold others.
    """

    def __init__(self, *, skip: Sequence[Path] = (), root: Path | None = None, apart: Collection[Path] = ()) -> None:
        self.notes: list[str] = []
        self.failures: dict[PictureFile, Failure] = {}
        """Pictures that the names of the files alone rule out."""
        self.apart = apart
        self.skipped: set[str] = set()
        """Keys of `skip` that name a picture."""
        self._skip = {_normal(path): path for path in skip}
        self._root = root
        self._absent = ""
        """A note on keys of `skip` that name no picture."""

    def is_skipped(self, path: PictureFile) -> bool:
        """Return True for a picture that `skip` names."""
        key = _normal(path)
        if key in self._skip:
            self.skipped.add(key)
        return key in self._skip

    def note_skipped(self) -> None:
        root = self._root
        shown = {key: path if root is None or root not in path.parents else path.relative_to(root) for key, path in self._skip.items()}
        if self.skipped:
            self.notes.append(f"left out by data.skip: {list_some([path for key, path in shown.items() if key in self.skipped], 3)}")
        absent = [path for key, path in shown.items() if key not in self.skipped]
        if absent:
            self._absent = f"data.skip names {list_some(absent, 3)}, which is not among the pictures: give paths from the recipe's folder"
            self.notes.append(self._absent)

    def failure_error(self, failures: Mapping[PictureFile, Failure]) -> DataError:
        """The error for pictures that cannot be used: the reason for the first one, and the names of the others, up to ten in all."""
        (_, first), *others = islice(failures.items(), MAX_FAILURES)
        absent = f" ({self._absent})" if self._absent else ""
        if not others:
            return DataError(f"{first.reason}, or name it under data.skip: {self._named(next(iter(failures)))}{absent}")
        names = ", ".join(f"{self._named(path)}{failure.short and f' ({failure.short})'}" for path, failure in others)
        number = f"{MAX_FAILURES} or more" if len(failures) >= MAX_FAILURES else f"{len(failures)}"
        return DataError(
            f"{first.reason}; {number} pictures cannot be used, also {names}: correct them, or name them under data.skip{absent}"
        )

    def _named(self, file: PictureFile) -> str:
        """The name of a picture as data.skip takes it: from the recipe's folder."""
        if not isinstance(file, Path):
            return f"{file.file.name}/{file.name}"
        return str(file if self._root is None or self._root not in file.parents else file.relative_to(self._root))

    def pictures_below(self, folder: Path, *, required: bool, apart: Collection[Path] = ()) -> dict[tuple[str, str], Path]:
        """The pictures in `folder` and all folders in it, by their place (`2024/`, or empty) and stem. Otherwise as `pictures_by_stem`."""
        found: dict[tuple[str, str], Path] = {}
        for place, path in folders_below(folder, apart=apart):
            inner = {composed(inside.name) for inside in subfolders(path)}
            for stem, file in self.pictures_by_stem(path, required=False, used=inner).items():
                other = found.setdefault((f"{place}/" if place else "", stem), file)
                if other is not file:  # two folders of one name, with its accents encoded in two ways
                    self.failures[file] = Failure(f"{other} and {file} have the same name: rename or remove one", f"the name of {other}")
        if required and not found:
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        return found

    def pictures_by_stem(self, folder: Path, *, required: bool = True, used: Collection[str] = ()) -> dict[str, Path]:
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
            elif stem not in found or self.is_skipped(found[stem]):
                found[stem] = path
            elif not self.is_skipped(path):
                other = found[stem]
                self.failures[path] = Failure(
                    f"{other} and {path.name} have the same stem: rename or remove one", f"the stem of {other.name}"
                )
        if required and not found:
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        if other_files:
            self.notes.append(f"{folder}: {count(len(other_files), 'file')} other than images, not used: {list_some(other_files, 3)}")
        if folders:
            self.notes.append(f"{folder}: the files in its subfolders ({list_some(folders)}) are not used")
        return found


def folders_apart(base: FolderPair, others: Sequence[FolderPair]) -> set[Path]:
    """Resolved folders that may lie inside that of the training pictures and hold others: the clean pictures and the other splits."""
    named = [folder for pair in (base, *others) for folder in (pair.images, pair.masks, pair.targets) if folder is not None]
    return {folder.resolve() for folder in named} - {base.images.resolve()}


def _normal(path: PictureFile) -> str:
    """A path for comparisons: without "..", in Unicode's form NFC."""
    return composed(os.path.normpath(str(path)))
