"""Pictures in shards: tar files in the layout of webdataset.

    000123.jpg        the picture: .jpg, .jpeg, .png, .webp, .tif, .tiff or .bmp
    000123.mask.png   its mask (or .seg.png), for `segment`
    000123.cls        its class as text, a number from 0 or a name, for `classify`

What comes before the first dot of a name is the key that joins these entries. Entries of other kinds are not used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from muntin.artifact.answers import ANSWERS, Task
from muntin.artifact.classes import ClassInfo
from muntin.data.items import ItemSource
from muntin.data.shards.index import shard_entries
from muntin.data.source import SPLITS
from muntin.data.splits import check_disjoint, empty_split_error, split_of
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES
from muntin.images.listing import composed, entries
from muntin.images.packed import PackedFile
from muntin.tasks.answers import ANSWERING
from muntin.tasks.classes import ClassSpec, class_infos, specs_of
from muntin.tasks.folders import Failure, PictureListing, SplitName
from muntin.tasks.reading import ReadingSettings
from muntin.tasks.samples import Item
from muntin.text import count, list_some, plain

CLASSES_NAME = "classes.json"
PICTURES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES if suffix != ".npy")
"""Ends of the names of pictures and masks."""
MASKS = ("mask", "seg")
_MAX_CLASSES_BYTES = 8 << 20


@dataclass(kw_only=True)
class ShardContent:
    """What the names in some shards tell. `failures`: pictures that cannot be used, with the reason."""

    pictures: dict[tuple[Path, str], PackedFile] = field(default_factory=dict)
    masks: dict[tuple[Path, str], PackedFile] = field(default_factory=dict)
    labels: dict[tuple[Path, str], str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    failures: dict[PackedFile, Failure] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """`segment` if there are masks."""
        return "segment" if self.masks else "classify"


def shard_files(place: Path) -> list[Path]:
    """The shards at a place: a folder of .tar files, one .tar file, or a pattern such as `shards/train-*.tar`. Raises DataError if none."""
    if any(letter in place.name for letter in "*?["):
        files = [path for path in sorted(place.parent.glob(place.name)) if path.is_file()]
    elif place.is_file():
        files = [place]
    else:
        files = [path for path in entries(place) if path.suffix.lower() == ".tar" and path.is_file()]
    if not files:
        raise DataError(f"{place} holds no shards: name a folder of .tar files, one of them, or a pattern such as train-*.tar")
    return files


def shard_content(files: Sequence[Path]) -> ShardContent:
    """Read the names of all entries. Raises DataError for a shard that cannot be read."""
    content = ShardContent()
    for path in files:
        for entry in shard_entries(path):
            folder, slash, last = entry.file.name.rpartition("/")
            stem, _, extension = last.partition(".")
            if not stem:  # a hidden file
                continue
            key, parts = (path, folder + slash + stem), tuple(extension.lower().split("."))
            if parts == ("cls",):
                content.labels[key] = entry.text or ""
            elif parts[-1] in PICTURES and len(parts) == 1 + (parts[0] in MASKS):
                files_by_key = content.masks if len(parts) == 2 else content.pictures
                if files_by_key.setdefault(key, entry.file) is not entry.file:
                    other = files_by_key[key]
                    content.failures[entry.file] = Failure(f"{other} and {last} have the same key: rename or remove one", "a key twice")
            else:
                content.others[extension] += 1
    return content


class ShardSource(ItemSource):
    """A `Source` that reads shards. The constructor reads the names of all entries, once: their index is kept in the user's cache.

    `base`: the training shards (`shard_files`); `validation` and `test`: shards of their own, or shares (0-1) of the entries in `base`.
    With masks the task is `segment`, otherwise `classify`. The classes of `reading` are by default those of `classes.json` beside the
    shards of `base`, a list of names or of classes; else, for `classify`, those that the entries `.cls` name. Entries to leave out are
    named as SHARD.tar/NAME. The other arguments are those of `FolderSource`.

    Raises DataError: no shards, a damaged shard, a shard in two splits, an empty split. Entries without a mask or class, and damaged ones,
    are named by `check`.
    """

    def __init__(
        self,
        *,
        base: Path,
        validation: Path | float,
        test: Path | float,
        reading: ReadingSettings,
        seed: int = 0,
        listing: PictureListing | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        shards: dict[SplitName, list[Path]] = {"train": shard_files(base)}
        others: dict[SplitName, Path | float] = {"validation": validation, "test": test}
        shards |= {name: shard_files(place) for name, place in others.items() if isinstance(place, Path)}
        check_disjoint(shards)
        contents = {name: shard_content(files) for name, files in shards.items()}
        super().__init__(contents["train"].task, channels=reading.channels, listing=listing or PictureListing())
        specs = reading.classes or read_classes(shards["train"][0].parent) or self._derived(base, contents["train"])
        self.classes = class_infos(specs, self.task)
        items = {name: self._items(content) for name, content in contents.items()}
        shares = {name: share for name, share in others.items() if not isinstance(share, Path)}
        splits = self._shared_out(items, shares, base, seed)
        if ANSWERS[self.task].one:
            self._note_absent_classes(splits)
        self._finish(splits, ANSWERING[self.task].folders.reader(replace(reading, classes=specs)), cache_bytes)

    def _derived(self, base: Path, content: ShardContent) -> list[ClassSpec]:
        if ANSWERS[self.task].masks:
            raise DataError(f"{base}: masks need at least two classes: name them under `classes`, or in {CLASSES_NAME} beside the shards")
        return classes_of_labels(content.labels.values())

    def _items(self, content: ShardContent) -> list[Item]:
        numbers = class_numbers(self.classes)
        self.listing.failures.update({file: failure for file, failure in content.failures.items() if not self.listing.is_skipped(file)})
        items: list[Item] = []
        for key, picture in content.pictures.items():
            mask, text = content.masks.get(key), content.labels.get(key)
            if self.listing.is_skipped(picture) or (mask is not None and self.listing.is_skipped(mask)):
                continue
            if ANSWERS[self.task].masks:
                if mask is None:
                    self.listing.failures[picture] = Failure(f"{picture} has no mask: add {plain(key[1])}.mask.png, remove it", "no mask")
                else:
                    items.append(Item(key=key[1], image=picture, target=mask))
                continue
            label = None if text is None else label_number(text, numbers)
            if label is None:
                known = list_some([entry.name for entry in self.classes])
                holds = "has no class: add" if text is None else f"has the class {plain(text)!r}, none of {known}: correct"
                self.listing.failures[picture] = Failure(f"{picture} {holds} {plain(key[1])}.cls, remove it", "no class")
            else:
                items.append(Item(key=key[1], image=picture, target=label))
        self._note_unused(content)
        return items

    def _note_unused(self, content: ShardContent) -> None:
        alone = [name for _, name in {**content.masks, **content.labels} if (_, name) not in content.pictures]
        if alone:
            self.listing.notes.append(f"{count(len(alone), 'key')} without a picture, not used: {plain(list_some(alone, 3))}")
        if content.others:
            kinds = plain(list_some([f".{kind}" for kind in content.others], 3))
            self.listing.notes.append(f"{count(sum(content.others.values()), 'file')} of other kinds, not used: {kinds}")

    def _shared_out(
        self, items: Mapping[SplitName, list[Item]], shares: Mapping[SplitName, float], base: Path, seed: int
    ) -> dict[SplitName, list[Item]]:
        splits: dict[SplitName, list[Item]] = {name: list(items[name]) if name in items and name != "train" else [] for name in SPLITS}
        for item in items["train"]:
            splits[split_of(item.key, seed, shares)].append(item)
        for name, chosen in splits.items():
            if not chosen and self.listing.failures:
                raise self.listing.failure_error(self.listing.failures)
            if not chosen:
                raise empty_split_error(name, [item.key for item in items["train"]], base, seed, shares)
        return splits


def classes_of_labels(labels: Iterable[str]) -> list[ClassSpec]:
    """The classes that the texts of entries `.cls` tell: their names, or class-0 up to the largest number."""
    texts = sorted({composed(text) for text in labels})
    if texts and all(text.isdecimal() for text in texts):
        return [ClassSpec(name=f"class-{number}") for number in range(min(max(map(int, texts)), 1 << 16) + 1)]
    return [ClassSpec(name=text) for text in texts if text and not text.isdecimal()]


def class_numbers(classes: Sequence[ClassSpec | ClassInfo]) -> dict[str, int]:
    """The number of each class by its name in form NFC."""
    return {composed(entry.name): number for number, entry in enumerate(classes)}


def label_number(text: str, numbers: Mapping[str, int]) -> int | None:
    """The class number of an entry `.cls`; None where it is none of the classes."""
    if composed(text) in numbers:
        return numbers[composed(text)]
    return int(text) if text.isdecimal() and int(text) < len(numbers) else None


def read_classes(folder: Path) -> list[ClassSpec]:
    """The classes in `classes.json` of a folder: a list of names, or of objects with name, color and value. Empty without the file."""
    path = folder / CLASSES_NAME
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > _MAX_CLASSES_BYTES:
            raise ValueError("it is too large")
        return specs_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, DataError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path} is no list of class names, or of objects with name, color and value: {text:.200}") from error
