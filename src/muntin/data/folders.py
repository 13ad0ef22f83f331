"""The user's own pictures, from folders.

`segment`: a folder of images and a folder of masks, matched by stem (`a.jpg` and `a.png`). `classify`: a folder that holds one
folder of images a class. The validation and test splits have folders of their own, or are shares of the one folder: a file's
split is decided by a hash of its stem and the seed alone, so that adding files moves none of the others.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from muntin.artifact.classes import Channel8, ClassInfo
from muntin.data.colors import distinct_colors
from muntin.data.source import MAX_CLASSES, SPLITS, DataTask, Progress, Sample, SampleCache, Samples, SplitName, UInt8
from muntin.errors import DataError
from muntin.runtime.images import IGNORED, IMAGE_SUFFIXES, image_size, read_image, read_mask

RGB = tuple[Channel8, Channel8, Channel8]
MaskValue = Annotated[int, Field(ge=0, le=65535)] | RGB
RUNS = "runs"
"""Where results go, beside the pictures perhaps."""
_SEEDS_TRIED = 1000
_KEYS_TRIED = 200_000  # pictures that are shared out in search of a seed by which no split lacks a class: a second or two
_LISTED = 5  # how many offending values an error names


class FolderPair(BaseModel):
    """Where one split lies: a folder of images, and for segmentation a folder of masks with the same stems."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Path = Field(description="folder of images; for `classify` it holds folders of classes, not all of them perhaps")
    masks: Path | None = Field(default=None, description="folder of masks; none for `classify`")

    def under(self, root: Path) -> FolderPair:
        """The same folders, relative paths taken from `root`."""
        return FolderPair(images=root / self.images, masks=None if self.masks is None else root / self.masks)


class ClassSpec(BaseModel):
    """One class of the recipe: its name, the colour it is painted in, and what stands for it in the masks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, description="unique among the classes; for `classify` the folder's name")]
    color: RGB | None = Field(default=None, description="red, green, blue, 0-255 each; by default one that differs from the others")
    value: MaskValue | None = Field(default=None, description="mask value, or [red, green, blue]; by default the class's index from 0")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture's files."""

    key: str  # unique in its folder, and what decides its split: the stem, for classification with the class's folder
    image: Path
    mask: Path | None = None
    label: int = -1


class FolderSource:
    """Folders as a `Source`; making one lists the folders and reads no picture.

    `base` holds the training pictures. `validation` and `test` are either folders of their own or the share (0-1) of the base
    folder's pictures that they take. With masks the task is `segment` and `classes` names them; without, it is `classify`, and `classes`
    are names of the base folder's folders (others are left aside and noted) or, where none is given, all of them; validation and test
    pictures may lack some, which is noted. Names are compared as `composed` gives them. `ignore` is the mask
    value or colour that counts as nothing. Decoded pictures are kept up to `cache_bytes`.

    Raises DataError: folder missing or empty, mask missing, a stem twice, an empty split, a picture in two splits, classes and folders
    that differ.
    """

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
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.task: DataTask = "classify" if base.masks is None else "segment"
        self.channels = channels
        self._notes: list[str] = []
        self._named = bool(classes)
        if self.task == "classify" and not classes:
            classes = [ClassSpec(name=folder.name) for folder in _class_folders(base.images).values() if not _is_run(folder)]
        self.classes = class_infos(classes)
        self._mapping = None if base.masks is None else MaskMapping(classes, ignore)
        items = self._split_items(base, {"validation": validation, "test": test}, seed)
        cache = SampleCache(cache_bytes)
        self._splits = {name: _FolderSamples(name, items[name], self.channels, self._mapping, cache) for name in SPLITS}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def split(self, name: SplitName) -> Samples:
        """The pictures of a split, in order of their stems."""
        return self._splits[name]

    def check(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Decodes every image and mask once and raises the first problem (DataError); names classes that no training mask holds."""
        total, done = sum(len(samples) for samples in self._splits.values()), 0
        seen = {name: np.zeros(256, dtype=np.int64) for name in SPLITS}
        for name, samples in self._splits.items():
            for sample in samples:
                labels = np.array([sample.target], dtype=np.uint8) if isinstance(sample.target, int) else sample.target.ravel()
                seen[name] += np.bincount(labels, minlength=256)
                done += 1
                if progress is not None:
                    progress(done, total)
            if not seen[name][:IGNORED].any():
                raise DataError(f"every pixel of the masks of the {name} split is ignored: there is nothing to learn from it or to score")
        absent = [entry.name for index, entry in enumerate(self.classes) if not seen["train"][index]]
        return (f"no training picture holds {', '.join(absent)}: a model cannot learn what it does not see",) if absent else ()

    def _split_items(self, base: FolderPair, others: Mapping[SplitName, FolderPair | float], seed: int) -> dict[SplitName, list[Item]]:
        shares = {name: other for name, other in others.items() if isinstance(other, float | int)}
        found = self._items(base)
        splits: dict[SplitName, list[Item]] = {name: [] for name in SPLITS}
        for item in found:
            splits[split_of(item.key, seed, shares)].append(item)
        if self.task == "classify":
            self._note_lacking({name: splits[name] for name in shares})
        for name, other in others.items():
            if isinstance(other, FolderPair):
                if (other.masks is None) != (base.masks is None):
                    raise DataError(f"`{name}` must name masks exactly where the training images have masks")
                splits[name] = self._items(other, name)
        empty = [name for name in SPLITS if not splits[name]]
        if empty:
            raise DataError(_empty_split(empty[0], [item.key for item in found], base.images, seed, shares))
        _check_apart(splits)
        return splits

    def _note_lacking(self, splits: Mapping[SplitName, Sequence[Item]]) -> None:
        """Of splits that are shares of the base folder's pictures, the classes that none of theirs is of."""
        for name, items in splits.items():
            there = {item.label for item in items}
            lacking = [entry.name for label, entry in enumerate(self.classes) if label not in there]
            if items and lacking:
                self._notes.append(
                    f"the {name} split has no picture of {_some(lacking)}, so its score says nothing of it: add pictures, or change "
                    "`data.seed`"
                )

    def _items(self, pair: FolderPair, split: SplitName = "train") -> list[Item]:
        """Of a split's folders; `train`: the base, whose pictures may be shared out."""
        if pair.masks is not None:
            return self._pairs(pair.images, pair.masks)
        names = [composed(entry.name) for entry in self.classes]
        folders = _class_folders(pair.images)
        lacking = [name for name in names if name not in folders]
        others = sorted(set(folders) - set(names))
        if (lacking and split == "train") or (not self._named and not all(_is_run(folders[name]) for name in others)):
            raise DataError(
                f"{pair.images} holds the folders {_some(sorted(folders))}, the classes are {_some(names)}: "
                f"{_some(sorted([*lacking, *others]))} differ; rename a folder, or name the classes that are to be learned under `classes`"
            )
        if others:
            self._notes.append(f"{pair.images}: the folders {_some(others)} are no classes of the recipe and are not used")
        items: list[Item] = []
        for label, name in enumerate(names):
            pictures = self._pictures(folders[name], needed=split == "train") if name in folders else {}
            items += [Item(key=f"{path.parent.name}/{path.stem}", image=path, label=label) for path in pictures.values()]
            if not pictures:
                lacking = [*dict.fromkeys([*lacking, name])]
        if not items:
            raise DataError(f"{pair.images} holds no image of a class: put some into the folders of the classes there")
        if lacking:
            self._notes.append(f"{pair.images}: no picture of {_some(lacking)}, so the {split} score says nothing of it")
        return items

    def _pairs(self, images: Path, masks: Path) -> list[Item]:
        pictures, truths = self._pictures(images), self._pictures(masks)
        missing = [path for stem, path in pictures.items() if stem not in truths]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]} has no mask{more}: add {masks / missing[0].stem}.png, or remove the image")
        unused = len(truths) - len(pictures)
        if unused:
            self._notes.append(f"{masks}: {unused} masks have no image and are not used")
        return [Item(key=path.stem, image=path, mask=truths[stem]) for stem, path in pictures.items()]

    def _pictures(self, folder: Path, *, needed: bool = True) -> dict[str, Path]:
        """Stem, composed -> file. Hidden files are passed over, others that are no images noted. None at all: an error, if `needed`."""
        pictures: dict[str, Path] = {}
        others, folders = 0, list[str]()
        for path in _entries(folder):
            stem = composed(path.stem)
            if path.is_dir():
                folders.append(path.name)
            elif not _is_picture(path):
                others += 1
            elif stem in pictures:
                raise DataError(f"{pictures[stem]} and {path.name} have the same stem: rename or remove one")
            else:
                pictures[stem] = path
        if needed and not pictures:
            raise DataError(f"{folder} holds no images: put some there ({', '.join(IMAGE_SUFFIXES)})")
        if others:
            self._notes.append(f"{folder}: {others} entries are no images and are not used")
        if folders:
            self._notes.append(f"{folder}: what lies in folders in it is not used ({_some(folders)})")
        return pictures


class _FolderSamples(Samples):
    def __init__(self, split: SplitName, items: Sequence[Item], channels: int, mapping: MaskMapping | None, cache: SampleCache) -> None:
        self._split, self._items, self._channels, self._mapping, self._cache = split, items, channels, mapping, cache
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def load(self, index: int) -> Sample:
        item = self._items[index]
        return self._cache.get((self._split, index), lambda: read_sample(item, self._channels, self._mapping))

    def sizes(self) -> Sequence[tuple[int, int]]:
        if self._sizes is None:
            self._sizes = [image_size(item.image) for item in self._items]
        return self._sizes


class MaskMapping:
    """From what masks hold, integers or colours, to class numbers 0..K-1 and 255 for ignored pixels."""

    def __init__(self, classes: Sequence[ClassSpec], ignore: int | RGB | None) -> None:
        values = [index if entry.value is None else entry.value for index, entry in enumerate(classes)]
        self.colors = not isinstance(values[0], int)
        if any(isinstance(value, int) == self.colors for value in values):
            raise DataError("the classes' values mix integers and colours: give every class an integer, or every class [red, green, blue]")
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DataError(f"two classes have the value {_shown(twice[0])}: every class needs its own")
        table = {_code(value): index for index, value in enumerate(values)}
        if ignore is not None and isinstance(ignore, int) != self.colors:  # an integer says nothing about colours: none is ignored then
            if _code(ignore) in table:
                name = classes[table[_code(ignore)]].name
                raise DataError(f"the value {_shown(ignore)} is both class {name!r} and `ignore`: set `ignore: null` or another value")
            table[_code(ignore)] = IGNORED
        self._codes = np.array(sorted(table), dtype=np.int64)
        self._labels = np.array([table[code] for code in sorted(table)], dtype=np.uint8)
        ignored = "none" if IGNORED not in table.values() else _shown(ignore)
        self._allowed = f"{_some([_shown(value) for value in values], 12)}; `ignore` is {ignored}"

    def __call__(self, mask: npt.NDArray[Any], path: Path) -> UInt8:
        """Labels (H, W) of a mask (H, W) or (H, W, 3) as `read_mask` gives it. Raises DataError naming `path` for a value of no class."""
        if mask.ndim == 3 and not self.colors:
            if not (mask == mask[:, :, :1]).all():
                raise DataError(f"{path} is a colour picture and the classes have integer values: give each class `value: [r, g, b]`")
            mask = mask[:, :, 0]
        codes = mask
        if self.colors:
            codes = (mask[:, :, 0].astype(np.int32) << 16) | (mask[:, :, 1].astype(np.int32) << 8) | mask[:, :, 2]
        labels, known = self._look_up(codes)
        if not known.all():
            odd = [_shown((code >> 16, code >> 8 & 255, code & 255) if self.colors else code) for code in np.unique(codes[~known]).tolist()]
            raise DataError(
                f"{path} holds the mask values {_some(odd)}, allowed are {self._allowed}: add a class, set `ignore`, or mend it"
            )
        return labels

    def _look_up(self, codes: npt.NDArray[Any]) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        if codes.dtype == np.uint8:  # ten times faster than the search, and by far the commonest
            small = self._codes < 256
            table, known = np.zeros(256, dtype=np.uint8), np.zeros(256, dtype=np.bool_)
            table[self._codes[small]], known[self._codes[small]] = self._labels[small], True
            return table[codes], known[codes]
        places = np.minimum(np.searchsorted(self._codes, codes), self._codes.size - 1)
        return self._labels[places], self._codes[places] == codes


def read_sample(item: Item, channels: int, mapping: MaskMapping | None) -> Sample:
    """Decodes one picture and its truth. Raises DataError: damaged file, sizes that differ, a mask value of no class."""
    image_HWC = read_image(item.image, channels)
    target: UInt8 | int = item.label
    if mapping is not None and item.mask is not None:
        mask = read_mask(item.mask, colors=mapping.colors)
        if mask.shape[:2] != image_HWC.shape[:2]:
            (height, width), (mask_height, mask_width) = image_HWC.shape[:2], mask.shape[:2]
            turned = (
                "; the picture is turned as its EXIF orientation says: turn the mask, too"
                if (width, height) == (mask_height, mask_width)
                else ""
            )
            raise DataError(
                f"{item.image} is {width}×{height} and its mask {item.mask} {mask_width}×{mask_height}: they must be of one size{turned}"
            )
        target = mapping(mask, item.mask)
    return Sample(name=item.key, image=image_HWC, target=target)


def composed(name: str) -> str:
    """A name with each accented letter as one character (Unicode's NFC): from a Mac it may come as a letter and its accent, which nobody
    sees."""
    return unicodedata.normalize("NFC", name)


def split_of(key: str, seed: int, shares: Mapping[SplitName, float]) -> SplitName:
    """The split of a picture: a uniform number from the hash of seed and key falls into a share or trains."""
    digest = hashlib.sha256(os.fsencode(f"{seed}/{composed(key)}")).digest()  # a name is bytes, and need not be text
    place, edge = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name in ("test", "validation"):
        edge += shares.get(name, 0.0)
        if place < edge:
            return name
    return "train"


def filling_seed(keys: Sequence[str], shares: Mapping[SplitName, float], first: int = 0, *, classes: bool = False) -> int | None:
    """The first seed from `first` on that leaves no split empty, or None where a thousand do not help.

    `classes`: keys begin with a class. Of the first few seeds it is then the first by which splits lack the fewest, training before all.
    """
    wanted, best = {"train", *shares}, (0, 0)
    tried = min(_SEEDS_TRIED, 1 + _KEYS_TRIED // max(1, len(keys))) if classes else 0
    every = len({key.partition("/")[0] for key in keys})
    found: int | None = None
    for seed in range(first, first + _SEEDS_TRIED):
        held = {(split_of(key, seed, shares), key.partition("/")[0] if classes else "") for key in keys}
        if {split for split, _ in held} != wanted:
            continue
        having = sum(split == "train" for split, _ in held), len(held)
        if having > best:
            found, best = seed, having
        if not classes or seed - first >= tried or len(held) == len(wanted) * every:
            break
    return found


def class_infos(classes: Sequence[ClassSpec]) -> tuple[ClassInfo, ...]:
    """Names and colours, missing colours filled in. Raises DataError: fewer than two, more than 255, or a name twice."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"{len(classes)} classes: from 2 to {MAX_CLASSES} are possible, name them under `classes`")
    twice = [name for name, count in Counter(composed(entry.name) for entry in classes).items() if count > 1]
    if twice:
        raise DataError(f"the class {twice[0]!r} is there twice: give each its own name")
    given = {entry.color for entry in classes}
    free = iter([color for color in distinct_colors(2 * len(classes)) if color not in given])
    return tuple(ClassInfo(name=entry.name, color=entry.color if entry.color is not None else next(free)) for entry in classes)


def _entries(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(f"the folder {folder} does not exist: check the path; relative paths start at the recipe's folder")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name the folder that holds the files")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _is_run(folder: Path) -> bool:
    """Whether it is what `fit` makes where it is called, and no class."""
    return folder.name == RUNS and not any(map(_is_picture, _entries(folder)))


def _class_folders(folder: Path) -> dict[str, Path]:
    """By the names of the classes."""
    folders = [path for path in _entries(folder) if path.is_dir()]
    if not folders:
        raise DataError(f"{folder} holds no folders: for `classify` put the images of each class into a folder of its name")
    found: dict[str, Path] = {}
    for path in folders:
        if not is_text(path.name):
            raise DataError(f"{str(path)!a}: a class is named by its folder, and this name is no UTF-8: rename it")
        if found.setdefault(composed(path.name), path) is not path:
            raise DataError(f"{folder} holds {path.name!r} twice, with its accents written in two ways: put the images into one folder")
    return found


def is_text(name: str) -> bool:
    """Whether a name from the file system, which is bytes, is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _empty_split(name: SplitName, keys: Sequence[str], folder: Path, seed: int, shares: Mapping[SplitName, float]) -> str:
    came = f"the {name} split of the {len(keys)} pictures in {folder} is empty"
    better = filling_seed(keys, shares, seed + 1)
    if better is not None:
        return f"{came}: set `seed: {better}` under data, which fills every split, add pictures, or name a folder for it"
    return f"{came}: at least {1 + len(shares)} pictures are needed; add pictures, change its share, or name a folder for it"


def _check_apart(splits: Mapping[SplitName, Sequence[Item]]) -> None:
    """Raises DataError where two splits hold the same picture, by another name or not: a score would say how well it was learned by heart.

    Links are followed; copies are not recognised.
    """
    split_by_file: dict[Path, SplitName] = {}
    folders: dict[Path, Path] = {}
    twice: list[tuple[Path, SplitName, SplitName]] = []
    for name, items in splits.items():
        for item in items:
            folder = item.image.parent
            if folder not in folders:
                folders[folder] = folder.resolve()
            file = item.image.resolve() if item.image.is_symlink() else folders[folder] / item.image.name
            first = split_by_file.setdefault(file, name)
            if first != name:
                twice.append((item.image, first, name))
    if twice:
        path, first, second = twice[0]
        more = f" (and {len(twice) - 1} more are in two splits)" if len(twice) > 1 else ""
        raise DataError(
            f"{path} is in the {first} and in the {second} split{more}: give each split pictures of its own, or a share of `images`"
        )


def _code(value: int | RGB) -> int:
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _some(values: Sequence[object], count: int = _LISTED) -> str:
    return ", ".join(str(value) for value in values[:count]) + (f" and {len(values) - count} more" if len(values) > count else "")
