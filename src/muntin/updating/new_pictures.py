"""The new pictures of a folder, in the layouts that `muntin init` knows: `images/` and `masks/`, or a folder for each class.

Both also in train/, val/ and test/, which are then the splits; otherwise each picture belongs to train, validation or test by a hash of its
name. A folder need not hold every class. Pictures that an earlier update saw, recognised by their content, are left out: a picture to judge
by never becomes one to train with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from muntin.artifact.answers import ANSWERS, Task
from muntin.data.folders import FolderSource
from muntin.data.items import ItemSamples
from muntin.data.source import SPLITS, CheckProgress
from muntin.data.splits import filling_seed
from muntin.errors import DataError
from muntin.images.listing import composed, folder_named, folders_below, paired_folders, paired_splits, pictures
from muntin.images.opening import PictureFile
from muntin.tasks.classes import RGB, ClassSpec
from muntin.tasks.classify.folders import class_folders
from muntin.tasks.folders import Failure, FolderPair, PictureListing, SplitName
from muntin.tasks.reading import ReadingSettings
from muntin.tasks.samples import Item
from muntin.text import count, list_some

UNKNOWN_VALUE = "`--class NAME={value}` adds a class of this value; otherwise correct the mask"


class NewPicturesError(DataError):
    """New pictures cannot be used. `files`: those at fault with the reasons, ten at most; empty if it is all of them together."""

    def __init__(self, message: str, files: Mapping[Path, str] | None = None) -> None:
        super().__init__(message)
        self.files = files or {}


class NewPictures(FolderSource):
    """A `Source` of a folder of new pictures. `classes`: the old ones, then the new ones. `known`: sha256 of pictures to leave out.

    Reads every file once for its digest. Raises `DataError` for a folder of a class that `classes` lacks, and for a file that cannot be
    opened; its kind `NewPicturesError` if too few pictures are new, and, also from `check` and `split`, for damaged ones.
    """

    def __init__(
        self,
        folder: Path,
        *,
        task: Task,
        classes: Sequence[ClassSpec],
        ignore: int | RGB | None,
        channels: int,
        validation: float,
        test: float,
        known: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self._listed: str | None = None
        self.digests: dict[Path, str] = {}
        """sha256 of the new pictures' files, their masks not included."""
        names = [entry.name for entry in classes]
        pairs = self._pairs = _split_folders(folder, task, names)
        digests = {path: digest_of(path) for pair in pairs.values() for path in _pictures(pair, names)}
        if not digests:
            raise DataError(f"--data {folder} holds no picture: put some there")
        skip = [path for path, digest in digests.items() if digest in known]
        if len(skip) == len(digests):
            raise NewPicturesError(
                f"{folder} holds no new picture: its {count(len(digests), 'picture')} are in an earlier update: add others"
            )
        self.digests = {path: digest for path, digest in digests.items() if digest not in known}
        super().__init__(
            task, base=pairs["train"], validation=pairs.get("validation", validation), test=pairs.get("test", test),
            reading=ReadingSettings(channels=channels, classes=classes, ignore=ignore, unknown=UNKNOWN_VALUE),
            listing=_NewListing(folder, skip),
        )  # fmt: skip

    def listing_digest(self) -> str:
        """sha256 of the names, contents and targets of all pictures, at the first call."""
        if self._listed is not None:
            return self._listed
        rows = []
        for name in SPLITS:
            for item in self.items(name):
                assert isinstance(item.image, Path)
                target = digest_of(item.target) if isinstance(item.target, Path) else item.key.partition("/")[0]
                split = f"{name}/" if name != "train" and name in self._pairs else ""
                rows.append([split + item.key, self.digests[item.image], target])
        self._listed = hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
        return self._listed

    def items(self, name: SplitName) -> Sequence[Item]:
        """The files of a split."""
        samples = self.split(name)
        assert isinstance(samples, ItemSamples)
        return samples.items

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """As of every source; all errors are `NewPicturesError`."""
        try:
            return super().check(progress)
        except NewPicturesError:
            raise
        except DataError as error:  # of all pictures of a split together
            raise NewPicturesError(str(error)) from error

    def _split_items(self, base: FolderPair, others: Mapping[SplitName, FolderPair | float], seed: int) -> dict[SplitName, list[Item]]:
        shares = {name: other for name, other in others.items() if isinstance(other, float)}
        keys = [item.key for item in self._items(base)]
        empty = [other.images for other in others.values() if isinstance(other, FolderPair) and not self._items(other)]
        self.listing.notes.clear()  # the second listing notes the same
        if empty:
            raise NewPicturesError(f"{empty[0]} holds no new picture: add some, or remove the folder, and pictures of train/ are taken")
        filling = filling_seed(keys, shares, by_class=ANSWERS[self.task].one)
        if filling is None:
            raise NewPicturesError(
                f"{self.folder} holds {count(len(keys), 'new picture')}: at least {1 + len(shares)} are needed, and more to judge by: some "
                "to train with, some for validation, some for the gate"
            )
        return super()._split_items(base, others, filling)

    def _items(self, pair: FolderPair, split: SplitName = "train") -> list[Item]:
        return super()._items(pair, "validation" if ANSWERS[self.task].one else split)  # of which classes may be absent


class _NewListing(PictureListing):
    def __init__(self, folder: Path, skip: Sequence[Path]) -> None:
        super().__init__(skip=skip, root=folder)
        self._folder = folder

    def note_skipped(self) -> None:
        if self.skipped:
            self.notes.append(f"{count(len(self.skipped), 'picture')} of {self._folder} known from an earlier update: left out")

    def failure_error(self, failures: Mapping[PictureFile, Failure]) -> DataError:
        files = {path: failure.reason for path, failure in failures.items() if isinstance(path, Path)}
        return NewPicturesError(str(super().failure_error(failures)), files)


def _split_folders(folder: Path, task: Task, names: Sequence[str]) -> dict[str, FolderPair]:
    """The folders by split; "validation" and "test" only if they have their own. Raises `DataError` for a folder of no known layout.

    `names`: the classes, which may be called as a split.
    """
    if not folder.is_dir():
        layout = "a folder for each class" if ANSWERS[task].one else "images/ and masks/"
        raise DataError(f"--data {folder}: no such folder: name one with {layout}")
    if ANSWERS[task].masks:
        if paired := paired_splits(folder):
            return {split: FolderPair(images=images, masks=masks) for split, (images, masks) in paired.items()}
        absent = next((role for role in ("images", "masks") if folder_named(folder, role) is None), None)
        problem = "holds no images with masks" if absent is None else f"has no folder {absent}"
        raise DataError(f"--data {folder} {problem}: put the pictures into images/ and their masks, of the same names, into masks/")
    train = folder_named(folder, "train")
    if train is None or composed(train.name) in names:
        return {"train": FolderPair(images=folder)}
    places = {"train": train} | {split: folder_named(folder, split) for split in ("validation", "test")}
    return {split: FolderPair(images=place) for split, place in places.items() if place is not None}


def _pictures(pair: FolderPair, names: Sequence[str]) -> list[Path]:
    """The picture files of a split. Raises `DataError` for a class's folder that `names` lacks."""
    if pair.masks is not None:
        places = [images for _, images, _ in paired_folders(pair.images, pair.masks)]
    else:
        folders = class_folders(pair.images)
        if unknown := sorted(set(folders) - {composed(name) for name in names}):
            raise DataError(
                f"--data {pair.images}: the folders {list_some(unknown)} are no classes of the model, which are {list_some(list(names))}: "
                f"`--class {unknown[0]}` adds a class, otherwise remove the folder"
            )
        places = [inside for own in folders.values() for _, inside in folders_below(own)]
    return [path for place in places for path in pictures(place)]


def digest_of(path: Path) -> str:
    """sha256 of a file. Raises `DataError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}: check its permissions") from error
