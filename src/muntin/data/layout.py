"""The layout of a user's directory: the folders of images, masks and classes, or shards, and notes on what in them is not used.

Recognised, names in any case: `images/` and `masks/`; `train/`, `val/` and `test/` that hold these; for classification, folders
named after the classes, with or without `train/`, `val/` and `test/` around them; shards, also in such folders, or with these words at the
start of their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from muntin.data.classes import list_some
from muntin.data.folders import FolderPair, folders_apart
from muntin.data.shards.source import ShardContent, shard_content, shard_files
from muntin.data.source import DataTask, SplitName
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES
from muntin.images.listing import (
    FOLDER_NAMES,
    composed,
    folder_named,
    holds_results,
    image_folder_pair,
    is_results_folder,
    paired_folders,
    paired_splits,
    pictures,
    pictures_below,
    subfolders,
)
from muntin.images.opening import PictureFile
from muntin.text import count

_EXPECTED = (
    "expected images/ and masks/ (or train/, val/ and test/ that hold these), or for classification one folder of images for each class, "
    f"with images as {', '.join(IMAGE_SUFFIXES)}; or shards, .tar files that hold 1.jpg with 1.mask.png or 1.cls"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of the training pictures, and of validation and test where these have folders of their own.

    `shards`: the content of the training shards; None for pictures in folders. `deep`: a folder is a class even
    if only folders below it hold pictures.
    """

    task: DataTask
    base: FolderPair
    validation: FolderPair | None
    test: FolderPair | None
    shards: ShardContent | None = None
    deep: bool = False

    def class_folders(self) -> list[Path]:
        """The folders of the classes of `classify`."""
        return _class_folders(self.base.images, deep=self.deep)

    def apart(self) -> set[Path]:
        """Resolved folders in that of the training pictures of `restore` which hold no training pictures."""
        pairs = [pair for pair in (self.validation, self.test) if pair is not None]
        return folders_apart(self.base, pairs)

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
            return {name: path for path, name in pictures_below(self.base.images, apart=self.apart()).items()}
        return {f"{folder.name}/{name}": path for folder in self.class_folders() for path, name in pictures_below(folder).items()}


def find_layout(root: Path, task: DataTask | None) -> Layout:
    """Find the folders in `root` that a recipe can name; `task` None means segmentation if there are masks, else classification.

    Raises DataError if there are none.
    """
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist: name the folder that holds your pictures")
    train, paired = folder_named(root, "train"), paired_splits(root)
    split_folders: dict[SplitName, Path | None] = {name: folder_named(root, name) for name in ("validation", "test")}
    for base in (root,) if train is None else (train, root):
        layout = None
        if task != "classify" and paired and paired["train"][0].parent == base:
            layout = _segment_layout(paired, split_folders, required=base is not root)
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
    deep = _class_folders(root, deep=True) if task is None else []
    recipe, hint = ("a recipe", "; photographs alone: `muntin init FOLDER --task restore`") if task is None else (f"a {task} recipe", "")
    if root.name.lower() in FOLDER_NAMES["images"] + FOLDER_NAMES["masks"] and image_folder_pair(root.resolve().parent):
        hint = f"; {root.resolve().parent} holds both images and masks: name it"
    elif len(deep) > 1:
        hint = f"; if {list_some([folder.name for folder in deep], 3)} are classes, whose pictures lie in folders below: --task classify"
    raise DataError(f"{root} holds nothing to make {recipe} of{reason}: {_EXPECTED}{hint}")


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


def nested_class_notes(base: Path) -> list[str]:
    """A note for each folder beside class folders that holds no pictures while its subfolders do. The results folder is left out."""
    notes = []
    for folder in subfolders(base):
        inner = [subfolder.name for subfolder in subfolders(folder) if pictures(subfolder)]
        if inner and not pictures(folder) and not is_results_folder(folder):
            only = f"only its subfolders ({list_some(inner, 3)}) hold pictures"
            notes.append(f"{folder.name} is not a class: {only}; if it is a class, run init with --task classify, without this recipe")
    return notes


def _segment_layout(paired: Mapping[str, tuple[Path, Path]], split_folders: Mapping[SplitName, Path | None], *, required: bool) -> Layout:
    """`required`: a split's folder without images and masks is an error; otherwise it is not used."""
    pairs = {name: FolderPair(images=images, masks=masks) for name, (images, masks) in paired.items()}
    for name, folder in split_folders.items():
        if required and folder is not None and name not in pairs:
            raise DataError(f"{folder} holds no images/ and masks/ with files in them, {pairs['train'].images.parent} does: {_EXPECTED}")
    return Layout(task="segment", base=pairs["train"], validation=pairs.get("validation"), test=pairs.get("test"))


def _classify_layout(base: Path, split_folders: Mapping[SplitName, Path | None], *, task_given: bool) -> Layout | None:
    class_folders = _class_folders(base, deep=task_given)
    if len(class_folders) < 2:
        return None
    names = {name for role in FOLDER_NAMES if role != "targets" for name in FOLDER_NAMES[role]}  # "clean" and "sharp" are classes, too
    reserved = next((folder for folder in class_folders if folder.name.lower() in names), None)
    if reserved is not None and not task_given:
        raise DataError(
            f"{reserved} has the name of a split, of images or of masks, and lies beside folders that do not fit it: {_EXPECTED}; if it is "
            "a class, use --task classify"
        )
    splits = {name: None if folder is None else FolderPair(images=folder) for name, folder in split_folders.items()}
    return Layout(
        task="classify", base=FolderPair(images=base), validation=splits.get("validation"), test=splits.get("test"), deep=task_given
    )  # fmt: skip


def _class_folders(base: Path, *, deep: bool) -> list[Path]:
    """The folders in `base` that hold pictures, `deep`: or whose folders below do."""
    return [folder for folder in subfolders(base) if pictures(folder) or (deep and not holds_results(folder) and pictures_below(folder))]


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
    folder = folder_named(root, role)
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
