"""Examine a user's directory: the folders of images, masks and classes, or shards; channels, sizes and classes of at most 64 files.

A file that cannot be read is left out of what is examined, and returned with the reason.

Recognised, names in any case: `images/` and `masks/`; `train/`, `val/` and `test/` that hold these; for classification, folders
named after the classes, with or without `train/`, `val/` and `test/` around them; shards, also in such folders, or with these words at the
start of their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from muntin.data.classes import RGB, ClassSpec, code_color, color_codes, distinct_colors, list_some
from muntin.data.folders import FolderPair, class_folders
from muntin.data.listing import composed, is_results_folder, paired_folders, pictures, subfolders
from muntin.data.shards.source import ShardContent, shard_content, shard_files
from muntin.data.source import MAX_CLASSES, DataTask, SplitName
from muntin.errors import DataError
from muntin.images import IGNORED, IMAGE_SUFFIXES, read_image, read_mask
from muntin.images.opening import PictureFile
from muntin.images.rasters import OpenRasters, Raster, is_windowed, mask_raster, picture_raster, sampled, tiff_header
from muntin.text import count

Content = TypeVar("Content")
File = TypeVar("File", bound=PictureFile)
MaskArray = npt.NDArray[Any]
_MAX_OPENED = 64  # files
_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_MAX_VALUES_BETWEEN = 8  # distinct values between 0 and 255 beyond which masks with mostly these two are taken for smoothed ones
_MIN_EXTREMES = 0.9  # fraction of the pixels that are 0 or 255 in smoothed masks of two classes
FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "images": ("images", "image", "imgs", "img"),
    "masks": ("masks", "mask", "labels", "annotations"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_EXPECTED = (
    "expected images/ and masks/ (or train/, val/ and test/ that hold these), or for classification one folder of images for each class, "
    f"with images as {', '.join(IMAGE_SUFFIXES)}; or shards, .tar files that hold 1.jpg with 1.mask.png or 1.cls"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of the training pictures, and of validation and test where these have folders of their own.

    `shards`: the content of the training shards; None for pictures in folders.
    """

    task: DataTask
    base: FolderPair
    validation: FolderPair | None
    test: FolderPair | None
    shards: ShardContent | None = None

    def places(self) -> list[tuple[str, Path, Path]]:
        """The folders of training images and masks, with those below them (`listing.paired_folders`); none for `classify`."""
        return [] if self.base.masks is None or self.shards is not None else paired_folders(self.base.images, self.base.masks)

    def training_pictures(self) -> Mapping[str, PictureFile]:
        """The training pictures by the key that decides their split, as in `items.Item`."""
        if self.shards is not None:
            return {key: file for (_, key), file in self.shards.pictures.items()}
        if self.task == "segment":
            return {f"{place}/{path.stem}".lstrip("/"): path for place, folder, _ in self.places() for path in pictures(folder)}
        if self.task == "restore":
            return {path.stem: path for path in pictures(self.base.images)}
        return {f"{folder.name}/{path.stem}": path for folder in subfolders(self.base.images) for path in pictures(folder)}


def find_layout(root: Path, task: DataTask | None) -> Layout:
    """Find the folders in `root` that a recipe can name; `task` None means segmentation if there are masks, else classification.

    Raises DataError if there are none.
    """
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist: name the folder that holds your pictures")
    train = _folder_named(root, "train")
    split_folders: dict[SplitName, Path | None] = {name: _folder_named(root, name) for name in ("validation", "test")}
    for base in (root,) if train is None else (train, root):
        layout = None
        if task != "classify":
            layout = _segment_layout(base, split_folders, required=base is not root)
        if layout is None and task != "segment":
            # Beside class folders, a folder called `test` may be a class: only the folders beside `train` are splits.
            layout = _classify_layout(base, {} if base is root else split_folders, task_given=task is not None)
        if layout is not None:
            return layout
    if (layout := _shard_layout(root, task)) is not None:
        return layout
    with_pictures = [folder for folder in subfolders(root if train is None else train) if pictures(folder)]
    single = f" (it has one folder with pictures, {with_pictures[0].name}: at least two classes are needed)" if with_pictures else ""
    reason = single if len(with_pictures) == 1 else ""
    recipe, hint = ("a recipe", "; photographs alone: --task restore") if task is None else (f"a {task} recipe", "")
    raise DataError(f"{root} holds nothing to make {recipe} of{reason}: {_EXPECTED}{hint}")


def unused_split_notes(base: Path) -> list[str]:
    """A note for each folder beside images and masks that has the name of a split and pictures, but not both images and masks."""
    notes = []
    for name in ("validation", "test"):
        folder = _folder_named(base, name)
        if (
            folder is not None
            and not _pair_in(folder)
            and (pictures(folder) or _folder_named(folder, "images") or _folder_named(folder, "masks"))
        ):
            notes.append(
                f"{folder.name}/ is not used, since it holds no images/ and masks/ with files: {name} takes a share of the other pictures"
            )
    return notes


def nested_class_notes(base: Path) -> list[str]:
    """A note for each folder beside class folders that holds no pictures while its subfolders do. The results folder is left out."""
    notes = []
    for folder in subfolders(base):
        inner = [subfolder.name for subfolder in subfolders(folder) if pictures(subfolder)]
        if inner and not pictures(folder) and not is_results_folder(folder):
            only = f"only its subfolders ({list_some(inner, 3)}) hold pictures"
            notes.append(f"{folder.name} is not a class: {only}; if it is a class, move them up into it")
    return notes


def _segment_layout(base: Path, split_folders: Mapping[SplitName, Path | None], *, required: bool) -> Layout | None:
    """`required`: a split's folder without images and masks is an error; otherwise it is not used."""
    pair = _pair_in(base)
    if pair is None:
        return None
    splits = {name: None if folder is None else _pair_in(folder) for name, folder in split_folders.items()}
    for name, folder in split_folders.items():
        if required and folder is not None and splits[name] is None:
            raise DataError(f"{folder} holds no images/ and masks/ with files in them, {base} does: {_EXPECTED}")
    return Layout(task="segment", base=pair, validation=splits["validation"], test=splits["test"])


def _classify_layout(base: Path, split_folders: Mapping[SplitName, Path | None], *, task_given: bool) -> Layout | None:
    class_folders = [folder for folder in subfolders(base) if pictures(folder)]
    if len(class_folders) < 2:
        return None
    reserved = next((folder for folder in class_folders if any(folder.name.lower() in names for names in FOLDER_NAMES.values())), None)
    if reserved is not None and not task_given:
        raise DataError(
            f"{reserved} has the name of a split, of images or of masks, and lies beside folders that do not fit it: {_EXPECTED}; if it is "
            "a class, use --task classify"
        )
    splits = {name: None if folder is None else FolderPair(images=folder) for name, folder in split_folders.items()}
    return Layout(task="classify", base=FolderPair(images=base), validation=splits.get("validation"), test=splits.get("test"))


def _shard_layout(root: Path, task: DataTask | None) -> Layout | None:
    """The shards in `root`, if it holds any. Raises DataError if they are for another task."""
    places: dict[str, Path | None] = {role: _shards_named(root, role) for role in ("train", "validation", "test")}
    base = places["train"] or (root if any(_is_shard(path) for path in root.iterdir()) else None)
    if base is None:
        return None
    content = shard_content(shard_files(base))
    if task not in (None, content.task) or not content.pictures:
        holds = f"masks for {content.task}" if content.masks else f"{count(len(content.labels), 'class')} and no masks"
        raise DataError(f"the shards {base} hold {count(len(content.pictures), 'picture')}, {holds}: {_EXPECTED}")
    # Without shards named `train`, those of another name are the training shards, and all others would be trained on, too.
    splits = {role: None if places["train"] is None or place is None else FolderPair(images=place) for role, place in places.items()}
    return Layout(
        task=content.task, base=FolderPair(images=base), validation=splits["validation"], test=splits["test"], shards=content
    )  # fmt: skip


def _shards_named(root: Path, role: str) -> Path | None:
    """The folder in `root` with one of the names for `role` that holds shards, or a pattern of the shards whose names begin with one."""
    folder = _folder_named(root, role)
    if folder is not None and any(_is_shard(path) for path in folder.iterdir()):
        return folder
    for path in sorted(root.iterdir()):
        word = re.match(r"[A-Za-z]*", path.name)
        if _is_shard(path) and word is not None and word[0].lower() in FOLDER_NAMES[role]:
            separator = path.name[word.end()]
            return root / f"{word[0]}{separator if separator in '-_' else ''}*.tar"
    return None


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and path.is_file() and not path.name.startswith(".")


def _folder_named(parent: Path, role: str) -> Path | None:
    """The folder in `parent` that has one of the names for `role`."""
    by_name = {path.name.lower(): path for path in subfolders(parent)}
    return next((by_name[name] for name in FOLDER_NAMES[role] if name in by_name), None)


def _pair_in(folder: Path) -> FolderPair | None:
    """The folders of images and masks in `folder`, if both hold pictures."""
    images, masks = _folder_named(folder, "images"), _folder_named(folder, "masks")
    if images is None or masks is None:
        return None
    places = paired_folders(images, masks)
    both = any(pictures(folder) for _, folder, _ in places) and any(pictures(folder) for *_, folder in places)
    return FolderPair(images=images, masks=masks) if both else None


def equal_stem_notes(folder: Path) -> list[str]:
    """A note if pictures in a folder have the same stem."""
    by_stem: dict[str, list[str]] = {}
    for path in pictures(folder):
        by_stem.setdefault(composed(path.stem), []).append(path.name)
    equal = [" and ".join(names) for names in by_stem.values() if len(names) > 1]
    return [f"{folder}: the same stem in {list_some(equal, 3)}; `muntin fit` refuses them: rename or remove all but one"] if equal else []


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


def spread(paths: Sequence[File]) -> Sequence[File]:
    """At most 64 of the paths, at even distances."""
    return paths[:: max(1, -(-len(paths) // _MAX_OPENED))]


def read_some(paths: Sequence[File], read: Callable[[File], Content]) -> tuple[dict[File, Content], dict[File, DataError]]:
    """Read at most 64 of the files. Returns their contents, and the errors of those that cannot be read.

    Raises the first error if no file can be read.
    """
    contents: dict[File, Content] = {}
    errors: dict[File, DataError] = {}
    for path in spread(paths):
        try:
            contents[path] = read(path)
        except DataError as error:
            errors[path] = error
    if not contents:
        raise next(iter(errors.values()))
    return contents, errors


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """Properties of a picture that a recipe depends on."""

    channels: int
    shorter_side: int
    opacity: bool
    """True if there are four channels and the fourth is constant."""


def picture_facts(path: PictureFile) -> PictureFacts:
    """Decode a picture, of a large TIFF some windows, and examine it. Raises DataError."""
    picture = picture_raster(path, OpenRasters(), None) if is_windowed(path) else read_image(path, None)
    image_HWC = sampled(picture) if isinstance(picture, Raster) else picture
    opacity = image_HWC.shape[2] == 4 and not np.ptp(image_HWC[:, :, 3])
    return PictureFacts(channels=image_HWC.shape[2], shorter_side=min(picture.shape[:2]), opacity=opacity)


def mask_pixels(path: PictureFile) -> MaskArray:
    """The mask in a file, of a large TIFF some windows. Pixels of the value that a TIFF marks as `nodata` are 255. Raises DataError."""
    mask = sampled(mask_raster(path, OpenRasters(), None), windows=8) if is_windowed(path) else read_mask(path)
    header = tiff_header(path)
    if header is None or header.nodata is None or mask.ndim == 3:
        return mask
    return np.where(mask == header.nodata, IGNORED, mask).astype(np.result_type(mask, np.uint8))


def picture_channels(facts: Mapping[PictureFile, PictureFacts]) -> int:
    """The number of channels to read pictures with: 1 if all are grey; that of .npy files if all agree; 4 if all are TIFFs of four
    channels and the fourth is not constant (opacity); 3 otherwise."""
    channels, suffixes = {picture.channels for picture in facts.values()}, {path.suffix.lower() for path in facts}
    if len(channels) == 1 and (1 in channels or suffixes == {".npy"}):
        return channels.pop()
    four_channel_tiffs = channels == {4} and suffixes <= {".tif", ".tiff"}
    return 4 if four_channel_tiffs and not all(picture.opacity for picture in facts.values()) else 3


def crop_side(facts: Mapping[PictureFile, PictureFacts], task: DataTask) -> int:
    """Side of the training crops, pixels: the median of the pictures' shorter sides rounded down to a multiple of 32, at least 32 and at
    most 256 (`classify`: 224, `restore`: 128)."""
    shorter_side = int(median(picture.shorter_side for picture in facts.values()))
    return min({"segment": 256, "classify": 224, "restore": 128}[task], max(32, shorter_side // 32 * 32))


def classes_in_folders(folder: Path) -> list[ClassSpec]:
    """A class for each folder in `folder` that holds pictures."""
    names = [path.name for path in class_folders(folder).values() if pictures(path)]
    return [ClassSpec(name=name, color=color) for name, color in zip(names, distinct_colors(len(names)), strict=True)]


@dataclass(frozen=True, kw_only=True)
class MaskClasses:
    """The classes that masks hold, and the value to ignore: 255, unless it is a class itself or the masks hold colours."""

    classes: tuple[ClassSpec, ...]
    ignore: int | None
    shares: tuple[float, ...]
    """Share of the pixels of each class. The sum is less than 1 if pixels are ignored."""


def classes_in_masks(masks: Mapping[PictureFile, MaskArray], folder: Path) -> MaskClasses:
    """Find the classes in masks of `folder`.

    Raises DataError if the values cannot be classes: fewer than two or more than 255 of them, JPEG masks, smoothed edges.
    """
    paths = list(masks)
    if any(mask.ndim == 3 and not (mask == mask[:, :, :1]).all() for mask in masks.values()):
        _check_lossless(paths, folder)
        pixels = pixel_counts([color_codes(masks[path] if is_windowed(path) else read_mask(path, colors=True)) for path in paths])
        _check_count(len(pixels), folder)
        painted = [code_color(code) for code in sorted(pixels)]
        classes = [ClassSpec(name=f"class-{index}", color=color, value=color) for index, color in enumerate(painted)]
        return MaskClasses(classes=tuple(classes), ignore=None, shares=class_shares(pixels, sorted(pixels)))
    pixels = pixel_counts(list(masks.values()))
    _check_sharp(pixels, paths, folder)
    values = sorted(pixels)
    if values[0] < 0 or values[-1] > 65535:
        raise DataError(f"the masks in {folder} hold values from {values[0]} to {values[-1]}: classes are numbers from 0 to 65535")
    ignore = None if _is_255_a_class(values) else IGNORED
    values = [value for value in values if value != ignore]
    _check_count(len(values), folder)
    colors = _palette_colors(paths, values) or list(distinct_colors(len(values)))
    pairs = zip(values, colors, strict=True)
    classes = [ClassSpec(name=f"class-{index}", color=color, value=value) for index, (value, color) in enumerate(pairs)]
    return MaskClasses(classes=tuple(classes), ignore=ignore, shares=class_shares(pixels, values))


def class_shares(pixels: Mapping[int, int], values: Sequence[int]) -> tuple[float, ...]:
    total = sum(pixels.values())
    return tuple(pixels.get(value, 0) / total for value in values)


def ignored_value_notes(masks: Mapping[PictureFile, MaskArray]) -> list[str]:
    """A note if 255 may be a class: no mask that holds it holds a class other than 0, and other masks do."""
    values = [set(np.unique(mask).tolist()) for mask in masks.values() if mask.ndim == 2]
    with_255 = [mask_values for mask_values in values if IGNORED in mask_values]
    if not with_255 or not set().union(*with_255) <= {0, IGNORED} or set().union(*values) <= {0, IGNORED}:
        return []
    return [
        f"255 is ignored, and the {len(with_255)} of {len(values)} masks that hold it hold no class but 0: if 255 is a class in them, "
        "replace it by the number that this class has in the other masks"
    ]


def pixel_counts(masks: Sequence[npt.NDArray[Any]]) -> dict[int, int]:
    """Number of pixels by value."""
    pixels: Counter[int] = Counter()
    for mask in masks:
        values, counts = np.unique(mask, return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return pixels


def _check_sharp(pixels: Mapping[int, int], paths: Sequence[PictureFile], folder: Path) -> None:
    """Raise DataError for masks of two classes, 0 and 255, with smoothed edges: each value in between would become a class."""
    between = [value for value in pixels if value not in (0, 255)]
    if not between:
        return
    _check_lossless(paths, folder)
    extremes = pixels.get(0, 0) + pixels.get(255, 0)
    spans_the_middle = min(between) < 128 <= max(between)
    if len(between) > _MAX_VALUES_BETWEEN and spans_the_middle and extremes > _MIN_EXTREMES * sum(pixels.values()):
        raise DataError(
            f"the masks in {folder} hold the values {', '.join(map(str, sorted(pixels)[:4]))}, ... ({len(pixels)} in all): "
            "their edges were smoothed, as by resizing; save them as PNG of whole class numbers, resized by nearest neighbour; "
            "if they hold two classes, threshold them at 128"
        )


def _check_lossless(paths: Sequence[PictureFile], folder: Path) -> None:
    lossy = next((path for path in paths if path.suffix.lower() in _LOSSY_SUFFIXES), None)
    if lossy is not None:
        raise DataError(
            f"{folder}: {lossy.name} is a JPEG, which blurs classes into each other; save masks as PNG "
            "(if they hold two classes, threshold them at 128)"
        )


def _check_count(count: int, folder: Path) -> None:
    if count > (most := MAX_CLASSES["segment"]):
        raise DataError(f"the masks in {folder} hold {count} values, more than {most}: save them as PNG (JPEG blurs them)")
    if count < 2:
        raise DataError(f"the masks in {folder} hold {count} classes: at least two classes are needed")


def _is_255_a_class(values: Sequence[int]) -> bool:
    """Return True if 255 is a class, as in masks of grey levels (0, 255; 0, 128, 255), and not the ignored value.

    Class numbers count up from 0, grey levels are far apart: with up to four values below 255 the largest of them is above 63, with more
    values above 127 and above twice their number.
    """
    below = [value for value in values if value != IGNORED]
    if IGNORED not in values or not below:
        return False
    return below == [0] or max(below) > max(63 if len(below) <= 4 else 127, 2 * len(below))


def _palette_colors(paths: Sequence[PictureFile], values: Sequence[int]) -> list[RGB] | None:
    """The colours of the values in the masks' palettes; None if there is no palette, it is grey, or two values have one colour."""
    color_by_value: dict[int, RGB] = {}
    for path in paths:
        if is_windowed(path):
            return None
        mask = read_mask(path)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            return None
        pixel_colors = read_mask(path, colors=True).reshape(-1, 3)
        for value, first in zip(*np.unique(mask, return_index=True), strict=True):
            red, green, blue = pixel_colors[first].tolist()
            color_by_value.setdefault(int(value), (red, green, blue))
    colors = [color_by_value[value] for value in values]
    grey = all(len(set(color)) == 1 for color in colors)
    return colors if not grey and len(set(colors)) == len(colors) else None
