"""Folders of images and masks: how they are found, paired and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES, image_size, read_image, read_mask
from muntin.images.listing import composed, folder_named, image_folder_pair, paired_folders, paired_splits, pictures, subfolders
from muntin.images.opening import PictureFile, UInt8
from muntin.images.rasters import OpenRasters, Raster, bands, is_windowed, mask_raster, picture_raster, tiff_header
from muntin.tasks.classes import MaskMapping
from muntin.tasks.folders import EXPECTED, Failure, FolderPair, Layout, PictureListing, SplitFolders, SplitName
from muntin.tasks.reading import Reader, ReadingSettings, TaskFolders
from muntin.tasks.samples import Item, Sample
from muntin.text import count, list_some


class MaskReader(Reader):
    """Reads images and masks. A large TIFF is not decoded, but read by window."""

    def __init__(self, reading: ReadingSettings) -> None:
        super().__init__(reading)
        self._mapping = MaskMapping(reading.classes, reading.ignore, reading.unknown)

    def read(self, item: Item, files: OpenRasters) -> Sample:
        """Raises DataError: a damaged file, sizes that differ, a mask value of no class."""
        channels = self.reading.channels
        image_HWC: UInt8 | Raster = (
            picture_raster(item.image, files, channels) if is_windowed(item.image) else read_image(item.image, channels)
        )
        header = tiff_header(item.target)
        convert = partial(self._mapping, path=item.target, nodata=None if header is None else header.nodata)
        windowed = is_windowed(item.target)
        mask = mask_raster(item.target, files, convert) if windowed else read_mask(item.target, colors=self._mapping.colors)
        if mask.shape[:2] != image_HWC.shape[:2]:
            (height, width), (mask_height, mask_width) = image_HWC.shape[:2], mask.shape[:2]
            rotated = (width, height) == (mask_height, mask_width)
            raise DataError(
                f"{item.image} is {width}×{height} and its mask {item.target} {mask_width}×{mask_height}: they must be of one size"
                + ("; the image is rotated by its EXIF orientation: rotate the mask, too" if rotated else "")
            )
        return Sample(name=item.key, image=image_HWC, target=mask if isinstance(mask, Raster) else convert(mask))

    def size(self, item: Item) -> tuple[int, int]:
        header = tiff_header(item.image) if is_windowed(item.image) else None
        return image_size(item.image) if header is None else (header.height, header.width)


def mask_items(listing: PictureListing, image_folder: Path, mask_folder: Path) -> list[Item]:
    """The images with their masks, in folders of the same names, too. Raises DataError for an empty folder."""
    places = paired_folders(image_folder, mask_folder)
    items: list[Item] = []
    for place, images, masks in places:
        items += _items_at(listing, place, images, masks, {name.partition("/")[0] for name in _below(place, places)})
    for folder, inside in ((image_folder, [images for _, images, _ in places]), (mask_folder, [masks for *_, masks in places])):
        if not any(pictures(path) for path in inside):
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
    return items


def _items_at(listing: PictureListing, place: str, image_folder: Path, mask_folder: Path, used: Collection[str]) -> list[Item]:
    """The items of one folder of images and its folder of masks. `used`: the names of their subfolders that are read, too."""
    images, masks = (listing.pictures_by_stem(folder, required=False, used=used) for folder in (image_folder, mask_folder))
    unused = [path.name for stem, path in masks.items() if stem not in images]
    for stem in [stem for stem in images if listing.is_skipped(images[stem]) or (stem in masks and listing.is_skipped(masks[stem]))]:
        del images[stem]
    for stem in [stem for stem in images if stem not in masks]:
        path = images.pop(stem)
        listing.failures[path] = Failure(f"{path} has no mask: add {mask_folder / path.stem}.png or remove the image", "no mask")
    if unused:
        listing.notes.append(f"{mask_folder}: {count(len(unused), 'mask')} without an image, not used: {list_some(unused, 3)}")
    return [Item(key=f"{place}/{path.stem}".lstrip("/"), image=path, target=masks[stem]) for stem, path in images.items()]


def _below(place: str, places: Sequence[tuple[str, Path, Path]]) -> list[str]:
    """The places below a place, relative to it."""
    prefix = f"{place}/" if place else ""
    return [other.removeprefix(prefix) for other, *_ in places if other and other != place and other.startswith(prefix)]


def mask_layout(paired: Mapping[str, tuple[Path, Path]], split_folders: SplitFolders, *, required: bool) -> Layout:
    """`required`: a split's folder without images and masks is an error; otherwise it is not used."""
    pairs = {name: FolderPair(images=images, masks=masks) for name, (images, masks) in paired.items()}
    for name, folder in split_folders.items():
        if required and folder is not None and name not in pairs:
            raise DataError(f"{folder} holds no images/ and masks/ with files in them, {pairs['train'].images.parent} does: {EXPECTED}")
    return Layout(task="segment", base=pairs["train"], validation=pairs.get("validation"), test=pairs.get("test"))


def unused_split_notes(base: Path) -> list[str]:
    """A note for each folder beside images and masks that has the name of a split and pictures, but not both images and masks."""
    notes = []
    for name in ("validation", "test"):
        folder = folder_named(base, name)
        if (
            folder is not None
            and not image_folder_pair(folder)
            and (pictures(folder) or folder_named(folder, "images") or folder_named(folder, "masks"))
        ):
            notes.append(
                f"{folder.name}/ is not used, since it holds no images/ and masks/ with files: {name} takes a share of the other pictures"
            )
    return notes


def unpaired_notes(pair: FolderPair) -> list[str]:
    """Notes on images without a mask and on masks without an image in the folders of a split."""
    if pair.masks is None:
        return []
    unmasked, unused, notes = list[str](), list[str](), list[str]()
    for place, image_folder, mask_folder in paired_folders(pair.images, pair.masks):
        images, masks = (
            {composed(path.stem): f"{place}/{path.name}".lstrip("/") for path in pictures(folder)} for folder in (image_folder, mask_folder)
        )
        unmasked += [name for stem, name in images.items() if stem not in masks]
        unused += [name for stem, name in masks.items() if stem not in images]
        inner, other = ({composed(path.name): path for path in subfolders(folder)} for folder in (image_folder, mask_folder))
        for one, two, folder in ((inner, other, mask_folder), (other, inner, image_folder)):
            alone = [path.name for name, path in one.items() if name not in two and pictures(path)]
            if alone:
                notes.append(
                    f"{next(iter(one.values())).parent}: the pictures in {list_some(alone, 3)} are not used: {folder} has no such folder"
                )
    if unmasked:
        without = f"{count(len(unmasked), 'image')} without a mask: {list_some(unmasked, 3)}"
        notes.append(f"{pair.images}: {without}; `muntin fit` refuses them: add masks, remove them, or name them under data.skip")
    if unused:
        without = f"{count(len(unused), 'mask')} without an image, not used: {list_some(unused, 3)}"
        notes.append(f"{pair.masks}: {without}{_ending(unmasked, unused)}")
    return notes


def _ending(images: Sequence[str], masks: Sequence[str]) -> str:
    """Advice if most of the masks are named as an image with one more ending: a.jpg and a_mask.png. Otherwise empty."""
    stems, named = ({name.rpartition(".")[0] for name in names} for names in (images, masks))
    endings = Counter(mask[end:] for mask in named if (end := max((n for n in range(len(mask)) if mask[:n] in stems), default=0)))
    ending, uses = endings.most_common(1)[0] if endings else ("", 0)
    return f"; {uses} of these names fit without their ending {ending!r}: rename them" if 2 * uses > len(masks) else ""


class MaskFolders(TaskFolders):
    """Images and masks, in folders of their own."""

    keys: ClassVar = ("masks",)
    needs: ClassVar = "task: segment needs data.masks; if each class has a folder of its own, write task: classify"

    def layout(self, root: Path, base: Path, split_folders: SplitFolders, *, given: bool) -> Layout | None:
        paired = paired_splits(root)
        if not paired or paired["train"][0].parent != base:
            return None
        return mask_layout(paired, split_folders, required=base is not root)

    def training_pictures(self, layout: Layout) -> Mapping[str, PictureFile]:
        places = [] if layout.base.masks is None else paired_folders(layout.base.images, layout.base.masks)
        return {f"{place}/{path.stem}".lstrip("/"): path for place, folder, _ in places for path in pictures(folder)}

    def items(
        self, listing: PictureListing, pair: FolderPair, split: SplitName, classes: Sequence[ClassInfo], *, given: bool
    ) -> list[Item]:
        return [] if pair.masks is None else mask_items(listing, pair.images, pair.masks)

    def reader(self, reading: ReadingSettings) -> MaskReader:
        return MaskReader(reading)

    def label_counts(self, sample: Sample, length: int) -> NDArray[np.int64]:
        """Reads a raster once, its picture too."""
        if isinstance(sample.image, Raster):
            for _ in bands(sample.image):
                pass
        counts = np.zeros(length, dtype=np.int64)
        for _, labels in bands(sample.labels):
            counts += np.bincount(labels.ravel(), minlength=length)
        return counts
