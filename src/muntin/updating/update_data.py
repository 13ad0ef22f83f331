"""The data of an update, written into the folder of its run: kept windows of the old data, and the new pictures.

    RUN/data/listing.json                      digests: of the parent's weights, of the new pictures
    RUN/data/train/images/old-00000.png ...    replay memory, and new-NAME.png
    RUN/data/train/masks/...                   the same names; for classify train/CLASS/old-00000.png
    RUN/data/validation/...  RUN/data/test/... held-out pictures, old and new

So the run is an ordinary one: its recipe names these folders, and a later update takes its memory from them. Masks keep the values of the
first recipe. The folder is written whole or not at all.

Background: in new data, pixels of the class `background` may hide old classes. Where the old model is sure of another old class, that class
replaces the label in train and validation, and the pixel is not counted in test. Source: pseudo-labels of PLOP (Douillard et al.,
2011.11390, section 3.2). Deviation: one threshold for all classes.

Axes: K classes, H W map, C channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from muntin.artifact.atomic_files import sync_directory
from muntin.data.config import DataConfig
from muntin.data.items import ItemSamples
from muntin.data.source import SPLITS, Samples, Source
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.opening import UInt8
from muntin.images.writing import encode_png, write_image, write_whole
from muntin.tasks.classes import RGB, ClassSpec
from muntin.tasks.classify.folders import EMPTY_MARK
from muntin.tasks.folders import FolderPair, SplitName
from muntin.tasks.samples import Sample
from muntin.training.checkpoint import Checkpoint
from muntin.training.config import UpdateConfig
from muntin.training.evaluation import tile_of
from muntin.updating.memory import PictureWindow, class_shares, remember_windows, windows_of
from muntin.updating.new_pictures import NewPictures, NewPicturesError

FOLDER, LISTING = "data", "listing.json"
OLD, NEW = "old-", "new-"
"""Prefixes of the names of pictures."""
LARGEST = 2048
"""Largest side of a new picture that is written as one file; larger ones are cut."""
Relabel = Callable[[UInt8, UInt8, bool], UInt8]
"""From a new picture, its labels, and whether they are to judge by, to labels without hidden old classes."""
Describe = Callable[[UInt8], NDArray[np.float32]]


class Listing(BaseModel):
    """Content of `listing.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    """sha256 of the parent's averaged weights."""
    data: str
    """Digest of the new pictures (`NewPictures.listing_digest`)."""
    settings: str
    """The `update` section as JSON, without what only the gate uses."""
    added: tuple[str, ...]
    """New classes."""
    known: tuple[str, ...]
    """sha256 of the files of all new pictures, of this update and those before it."""
    old: dict[str, int]
    """Old windows by split."""
    new: dict[str, int]
    """New pictures by split."""
    relabelled: int = 0
    """Background pixels of new pictures in which the old model found an old class."""
    unseen: tuple[str, ...] = ()
    """Classes that no picture to train with shows."""


def class_specs(checkpoint: Checkpoint) -> tuple[ClassSpec, ...]:
    """The classes of a checkpoint with their values in masks."""
    given = {entry.name: entry for entry in checkpoint.recipe.data.classes}
    return tuple(
        ClassSpec(name=info.name, color=info.color, value=given[info.name].value if info.name in given else None)
        for info in checkpoint.state.classes
    )


def all_classes(checkpoint: Checkpoint, added: Sequence[ClassSpec]) -> tuple[ClassSpec, ...]:
    """The old classes, then the new ones, all with values. Raises `DataError` for a class that exists."""
    old = class_specs(checkpoint)
    for entry in added:
        if entry.name in [one.name for one in old]:
            raise DataError(f"--class {entry.name}: the model has this class already: leave the option out")
    specs = (*old, *added)
    if not checkpoint.recipe.answer.masks:
        return specs
    return tuple(spec.model_copy(update={"value": index if spec.value is None else spec.value}) for index, spec in enumerate(specs))


def update_data_config(checkpoint: Checkpoint, specs: Sequence[ClassSpec]) -> DataConfig:
    """The `data` section of an update's recipe; its paths start at the run's folder."""
    masked = checkpoint.recipe.answer.masks

    def pair(split: SplitName) -> FolderPair:
        place = Path(FOLDER) / split
        return FolderPair(images=place / "images", masks=place / "masks") if masked else FolderPair(images=place)

    kept = {
        name: getattr(checkpoint.recipe.data, name)
        for name in ("channels", "cache_mib", "workers", "crop", "rare", "augment", "augmentation")
    }
    train = pair("train")
    ignore = _ignore_value(checkpoint.recipe.data.ignore, specs) if masked else IGNORED
    return DataConfig(
        source="folders", images=train.images, masks=train.masks, validation=pair("validation"), test=pair("test"),
        classes=tuple(specs), ignore=ignore, **kept,
    )  # fmt: skip


def _ignore_value(ignore: int | RGB | None, specs: Sequence[ClassSpec]) -> int | RGB:
    """The value of ignored pixels: the recipe's, or one that no class has."""
    values: list[int | RGB | None] = [spec.value for spec in specs]
    if isinstance(values[0], tuple):
        colors: list[RGB] = [(level, level, level) for level in range(256)]
        return ignore if isinstance(ignore, tuple) else next(color for color in colors if color not in values)
    numbers: list[int] = [*([ignore] if isinstance(ignore, int) else []), IGNORED, *range(1 << 16)]
    return next(number for number in numbers if number not in values)


def read_listing(directory: Path) -> Listing | None:
    """The listing of an update's folder; None if its data are not complete. Raises `DataError` if it is damaged."""
    path = directory / FOLDER / LISTING
    if not path.is_file():
        return None
    try:
        return Listing.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:120]}): remove {directory} and update again") from error


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """Content of an update. `old`: the data of the parent. `classes`: all of them, the new ones last."""

    parent: Checkpoint
    old: Source
    new: NewPictures
    config: UpdateConfig
    classes: tuple[ClassSpec, ...]
    known: tuple[str, ...] = ()

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the new classes."""
        return tuple(entry.name for entry in self.classes[len(self.parent.state.classes) :])

    @property
    def side(self) -> int | None:
        """Largest side of the windows of old pictures, pixels; None for classify, whose pictures are kept whole."""
        return tile_of(self.parent.recipe.data.crop) if self.parent.recipe.answer.masks else None

    def settings(self) -> str:
        """The settings that the data and the training depend on, as JSON."""
        return self.config.model_dump_json(exclude={"accept"})

    def listing(self, **counts: object) -> Listing:
        """The listing, for equal data equal but for `counts`."""
        fields = {
            "parent": self.parent.state.weights, "data": self.new.listing_digest(), "settings": self.settings(), "added": self.added,
            "known": tuple(sorted({*self.known, *self.new.digests.values()})), "old": {}, "new": {},
        }  # fmt: skip
        return Listing.model_validate(fields | counts)

    def same(self, listing: Listing) -> bool:
        """True if the listing is of this plan."""
        compared = {"parent", "data", "settings", "added"}
        return listing.model_dump(include=compared) == self.listing().model_dump(include=compared)


def write_data(
    plan: UpdatePlan, directory: Path, *, describe: Describe | None, relabel: Relabel | None, report: Callable[[str], None]
) -> None:
    """Write the data of an update into its folder. `describe`: features for herding. `relabel`: for a background."""
    target, part = directory / FOLDER, directory / f".{FOLDER}.partial"
    shutil.rmtree(part, ignore_errors=True)  # of a killed run
    old: dict[str, int] = {}
    new: dict[str, int] = {}
    relabelled = 0
    writer = _PictureWriter(part, plan)
    seen = np.zeros(len(plan.classes), bool)
    memory = plan.config.memory if plan.side is not None else max(plan.config.memory, len(plan.parent.state.classes))  # one of each class
    limits = {"train": memory, "validation": max(2, plan.config.held_out // 4), "test": plan.config.held_out}
    for split in SPLITS:
        report(f"keeping old pictures ({split})")
        samples = plan.old.split(split)
        chosen = remember_windows(
            samples, count=limits[split], classes=len(plan.parent.state.classes), side=plan.side, seed=plan.parent.recipe.seed,
            features=describe if split == "train" else None,
        )  # fmt: skip
        for number, window in enumerate(chosen):
            image, labels = window.cut(samples)
            writer.write(split, f"{OLD}{number:05d}", image, labels)
            seen |= (class_shares(labels, len(seen)) > 0) & (split == "train")
        report(f"writing new pictures ({split})")
        new[split] = 0
        for name, image, labels in _new_pieces(plan.new.split(split)):
            if relabel is not None and not isinstance(labels, int):
                changed = relabel(image, labels, split == "test")
                relabelled += int((changed != labels).sum())
                labels = changed
            writer.write(split, name, image, labels)
            seen |= (class_shares(labels, len(seen)) > 0) & (split == "train")
            new[split] += 1
        old[split] = len(chosen)
    unseen = tuple(entry.name for entry, is_seen in zip(plan.classes, seen, strict=True) if not is_seen)
    for name in unseen if plan.side is None else ():
        write_whole(part / "train" / name / EMPTY_MARK, b"")
    listing = plan.listing(old=old, new=new, relabelled=relabelled, unseen=unseen)
    write_whole(part / LISTING, listing.model_dump_json(indent=1).encode())
    shutil.rmtree(target, ignore_errors=True)  # without a listing, as it is not complete
    part.rename(target)
    sync_directory(directory)


def _new_pieces(samples: Samples) -> Iterator[tuple[str, UInt8, UInt8 | int]]:
    """The new pictures with their names, large ones in parts."""
    for window in windows_of(samples, LARGEST):
        sample = samples[window.index]
        image, target = window.cut(samples) if not isinstance(sample.target, int) else (sample.image[:, :], sample.target)
        whole = (window.height, window.width) == sample.image.shape[:2]
        if isinstance(target, int) and (window.top or window.left):
            continue  # a classifier sees the whole picture
        place = sample.name.partition("/")[2] if isinstance(target, int) else sample.name  # below the folder of its class
        stem = place.replace("/", "--")
        yield f"{NEW}{stem}" if whole or isinstance(target, int) else f"{NEW}{stem}-{window.top}-{window.left}", image, target


class _PictureWriter:
    """Writes pictures with their targets as a folder source reads them."""

    def __init__(self, folder: Path, plan: UpdatePlan) -> None:
        self._folder, self._specs, self._answer = folder, plan.classes, plan.parent.recipe.answer
        self._suffix = ".png" if plan.parent.recipe.data.channels in (1, 3, 4) else ".npy"
        ignore = update_data_config(plan.parent, plan.classes).ignore
        values = [*(spec.value for spec in plan.classes), ignore]
        if self._answer.masks:
            width = (256, 3) if isinstance(values[0], tuple) else (256,)
            self._table = np.zeros(
                width, np.uint8 if width == (256, 3) or max(v for v in values if isinstance(v, int)) < 256 else np.uint16
            )
            for index, value in enumerate(values[:-1]):
                self._table[index] = value
            self._table[IGNORED] = values[-1]
        for split in SPLITS:
            names = [entry.name for entry in plan.classes] if self._answer.one else ["images", "masks"]
            for name in names:
                (folder / split / name).mkdir(parents=True)

    def write(self, split: SplitName, name: str, image: UInt8, target: UInt8 | int) -> None:
        folder = self._folder / split
        place = folder / self._specs[target].name if isinstance(target, int) else folder / "images"
        file = place / f"{name}{self._suffix}"
        if file.exists():
            raise NewPicturesError(f"two new pictures would both be written as {split}/{place.name}/{file.name}: rename one")
        write_image(file, image)
        if not isinstance(target, int):
            write_whole(folder / "masks" / f"{name}.png", encode_png(self._table[target]))


def of_kind(samples: Samples, prefix: str) -> Samples:
    """The samples of an update's split whose names begin with `OLD` or `NEW`."""
    assert isinstance(samples, ItemSamples)
    return samples.select([index for index, item in enumerate(samples.items) if item.key.rpartition("/")[2].startswith(prefix)])


def windows_to_judge(samples: Samples, side: int | None) -> list[Sample]:
    """The windows by which an artefact is judged, each a sample of its own; decoded."""
    windows: list[PictureWindow] = windows_of(samples, side)
    judged = []
    for window in windows:
        image, target = window.cut(samples)
        judged.append(Sample(name=samples[window.index].name, image=image, target=target))
    return judged
