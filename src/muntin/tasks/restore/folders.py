"""Folders of photographs that are degraded here, or of degraded and clean pictures: how they are found, paired and read.

Recognised, names in any case: pictures in the folder itself or in its `images/` (or `clean/`), which are degraded by the recipe; `images/`
and `targets/` with the degraded and the clean pictures of the same stems (`a.jpg` and `a.png`), in subfolders of the same names; both also
in `train/`, `val/` and `test/`. Pictures in subfolders of these count, too. A clean picture has `scale` times the sides of its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES, image_size, read_image
from muntin.images.listing import FOLDER_NAMES, composed, pictures_below, subfolders
from muntin.images.opening import PictureFile
from muntin.images.rasters import OpenRasters
from muntin.tasks.folders import Failure, FolderPair, Layout, PictureListing, SplitFolders, SplitName, folders_apart
from muntin.tasks.reading import Reader, ReadingSettings, TaskFolders
from muntin.tasks.restore.degradation import MAX_SCALE, generator_of
from muntin.tasks.samples import Item, Sample
from muntin.text import count, list_some

_IMAGES = (*FOLDER_NAMES["images"], "photos", "photographs", "pictures", "degraded", "noisy", "lr")
_TARGETS = FOLDER_NAMES["targets"]
_EXPECTED = (
    "expected photographs in it, in images/ or in clean/; or images/ and targets/, the degraded and the clean pictures of the same names; "
    f"also in train/, val/ and test/, with images as {', '.join(IMAGE_SUFFIXES)}"
)


class RestoredReader(Reader):
    """Reads and degrades pictures: one of 10 megapixels takes about half a second."""

    def read(self, item: Item, files: OpenRasters) -> Sample:
        """Raises DataError: a damaged file, a picture smaller than `scale` pixels, sizes of a pair that do not fit."""
        image_HWC, scale, degrade = read_image(item.image, self.reading.channels), self.reading.scale, self.reading.degrade
        height, width = image_HWC.shape[:2]
        if degrade is not None:
            if min(height, width) < scale:
                raise DataError(f"{item.image} is {width}×{height}, too small to be reduced by {scale}: remove it")
            clean_HWC = image_HWC[: height - height % scale, : width - width % scale]
            return Sample(name=item.key, image=degrade(clean_HWC, generator_of(item.key)), target=clean_HWC, degradation=degrade)
        clean_HWC = read_image(item.target, self.reading.channels)
        if clean_HWC.shape[:2] != (scale * height, scale * width):
            raise DataError(
                f"{item.image} is {width}×{height} and its clean picture {item.target} {clean_HWC.shape[1]}×{clean_HWC.shape[0]}: it must "
                f"be {scale * width}×{scale * height} (data.scale {scale})"
            )
        return Sample(name=item.key, image=image_HWC, target=clean_HWC)

    def size(self, item: Item) -> tuple[int, int]:
        height, width = image_size(item.image)
        scale = 1 if self.reading.degrade is None else self.reading.scale
        return max(1, height // scale), max(1, width // scale)


def restored_items(listing: PictureListing, pair: FolderPair) -> list[Item]:
    """The pictures, each with its clean one where `pair` has targets."""
    images = listing.pictures_below(pair.images, required=True, apart=set(listing.apart) - {pair.images.resolve()})
    if pair.targets is None:
        return [Item(key=f"{place}{path.stem}", image=path) for (place, _), path in images.items() if not listing.is_skipped(path)]
    targets = listing.pictures_below(pair.targets, required=True)
    unused = [f"{name[0]}{path.name}" for name, path in targets.items() if name not in images]
    items = []
    for name, path in images.items():
        if listing.is_skipped(path) or (name in targets and listing.is_skipped(targets[name])):
            continue
        if name in targets:
            items.append(Item(key=f"{name[0]}{path.stem}", image=path, target=targets[name]))
        else:
            advice = f"add {pair.targets / name[0] / path.stem}.png or remove the image"
            listing.failures[path] = Failure(f"{path} has no clean picture: {advice}", "no clean picture")
    if unused:
        listing.notes.append(f"{pair.targets}: {count(len(unused), 'picture')} without an image, not used: {list_some(unused, 3)}")
    return items


def scale_of_pairs(pair: FolderPair) -> int:
    """The scale of the first pair of pictures, from the headers of their files; 1 where there is no pair. Raises DataError for another."""
    assert pair.targets is not None
    images, targets = ({composed(name): path for path, name in pictures_below(folder).items()} for folder in (pair.images, pair.targets))
    stem = next((stem for stem in images if stem in targets), None)
    if stem is None:
        return 1
    (height, width), (clean_height, clean_width) = image_size(images[stem]), image_size(targets[stem])
    scale = clean_height // max(1, height)
    if not 1 <= scale <= MAX_SCALE or (clean_height, clean_width) != (scale * height, scale * width):
        raise DataError(
            f"{images[stem]} is {width}×{height} and its clean picture {targets[stem]} {clean_width}×{clean_height}: the sides of a clean "
            f"picture are 1 to {MAX_SCALE} times the image's, the same for both"
        )
    return scale


def restored_layout(root: Path) -> Layout:
    """Find the folders in `root` that a recipe of restore can name. Raises DataError if there are none."""
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist: name the folder that holds your pictures")
    train, validation, test = (_named(root, FOLDER_NAMES[name]) for name in ("train", "validation", "test"))
    base = None if train is None else _photographs(train)
    required = base is not None
    if base is None:
        base = _photographs(root)
    if base is None:
        raise DataError(f"{root} holds nothing to make a restore recipe of: {_EXPECTED}")
    splits = [None if folder is None else _photographs(folder) for folder in (validation, test)]
    for index, (folder, pair) in enumerate(zip((validation, test), splits, strict=True)):
        if folder is not None and (pair is None or (pair.targets is None) != (base.targets is None)):
            if required:
                raise DataError(f"{folder} does not hold pictures as {train} does: {_EXPECTED}")
            splits[index] = None  # beside photographs in the folder itself: no split
    return Layout(task="restore", base=base, validation=splits[0], test=splits[1])


def restore_notes(layout: Layout) -> list[str]:
    """Notes on pictures that have no partner."""
    notes = []
    for pair in (layout.base, layout.validation, layout.test):
        if pair is not None and pair.targets is not None:
            images, targets = (
                {composed(name): path.relative_to(folder).as_posix() for path, name in pictures_below(folder).items()}
                for folder in (pair.images, pair.targets)
            )
            for folder, own, other in ((pair.images, images, targets), (pair.targets, targets, images)):
                alone = [name for stem, name in own.items() if stem not in other]
                if alone:
                    notes.append(f"{folder}: {count(len(alone), 'picture')} without a partner: {list_some(alone, 3)}")
    return notes


def restore_lines(layout: Layout, targets: str) -> list[str]:
    """The lines of a recipe that say how inputs are made, or where the clean pictures are: `targets`, as YAML."""
    if layout.base.targets is not None:
        return [f"  targets: {targets}  # the clean pictures; each has the stem of its degraded one in `images`: a.jpg and a.png"]
    return [
        "  degrade:  # how inputs are made from the photographs; anew for every crop, by the picture's name for validation and test",
        "    noise: 25  # Gaussian noise in grey levels of 255; or a range such as [5, 50]",
        "    scale: 1  # 2, 3 or 4: the input has 1/scale of the sides, and the model enlarges",
        "    jpeg: null  # quality of a JPEG compression, 1-100, or a range such as [40, 90]",
    ]


def _photographs(folder: Path) -> FolderPair | None:
    """The photographs in `folder`: in folders of images and targets, in one of these, or directly."""
    images, targets = _named(folder, _IMAGES), _named(folder, _TARGETS)
    if images is not None and targets is not None:
        return FolderPair(images=images, targets=targets)
    alone = images or targets
    if alone is not None:
        return FolderPair(images=alone)
    return FolderPair(images=folder) if pictures_below(folder, apart=folders_apart(FolderPair(images=folder), [])) else None


def _named(parent: Path, names: tuple[str, ...]) -> Path | None:
    chosen = [path for path in subfolders(parent) if path.name.lower() in names]
    by_name = {path.name.lower(): path for path in chosen if names not in (_IMAGES, _TARGETS) or pictures_below(path)}
    return next((by_name[name] for name in names if name in by_name), None)


class RestoredFolders(TaskFolders):
    """Photographs that are degraded here, or degraded and clean pictures."""

    keys: ClassVar = ("degrade", "targets")
    needs: ClassVar = "task: restore needs data.degrade, such as {noise: 25} or {scale: 2}, or data.targets, the clean pictures"
    guessed: ClassVar = False

    def layout(self, root: Path, base: Path, split_folders: SplitFolders, *, given: bool) -> Layout:
        return restored_layout(root)

    def training_pictures(self, layout: Layout) -> Mapping[str, PictureFile]:
        return {name: path for path, name in pictures_below(layout.base.images, apart=layout.apart()).items()}

    def items(
        self, listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool
    ) -> list[Item]:
        return restored_items(listing, pair)

    def reader(self, reading: ReadingSettings) -> RestoredReader:
        return RestoredReader(reading)
