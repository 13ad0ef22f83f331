"""The layout of a user's directory: the folders of images, masks and classes, or shards, and notes on what in them is not used.

Recognised, names in any case: `images/` and `masks/`; `train/`, `val/` and `test/` that hold these; for classification, folders
named after the classes, with or without `train/`, `val/` and `test/` around them; shards, also in such folders, or with these words at the
start of their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from muntin.artifact.answers import Task
from muntin.data.shards.source import shard_content, shard_files
from muntin.errors import DataError
from muntin.images.listing import (
    FOLDER_NAMES,
    composed,
    folder_named,
    image_folder_pair,
    pictures,
    subfolders,
)
from muntin.images.opening import PictureFile
from muntin.tasks.answers import ANSWERING
from muntin.tasks.classify.folders import folders_of_classes
from muntin.tasks.folders import EXPECTED, FolderPair, Layout, SplitName
from muntin.text import count, list_some


def find_layout(root: Path, task: Task | None) -> Layout:
    """Find the folders in `root` that a recipe can name; `task` None means segmentation if there are masks, else classification.

    Raises DataError if there are none.
    """
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist: name the folder that holds your pictures")
    train = folder_named(root, "train")
    split_folders: dict[SplitName, Path | None] = {name: folder_named(root, name) for name in ("validation", "test")}
    for base in (root,) if train is None else (train, root):
        for candidate in [name for name in ANSWERING if ANSWERING[name].folders.guessed] if task is None else [task]:
            # Beside `root` itself, a folder called `test` may be a class: only the folders beside `train` are splits for certain.
            layout = ANSWERING[candidate].folders.layout(root, base, split_folders, given=task is not None)
            if layout is not None:
                return layout
    if (layout := _shard_layout(root, task)) is not None:
        return layout
    with_pictures = [folder for folder in subfolders(root if train is None else train) if pictures(folder)]
    single = f" (it has one folder with pictures, {with_pictures[0].name}: at least two classes are needed)" if with_pictures else ""
    reason = single if len(with_pictures) == 1 else ""
    deep = folders_of_classes(root, deep=True) if task is None else []
    recipe, hint = ("a recipe", "; photographs alone: `muntin init FOLDER --task restore`") if task is None else (f"a {task} recipe", "")
    if root.name.lower() in FOLDER_NAMES["images"] + FOLDER_NAMES["masks"] and image_folder_pair(root.resolve().parent):
        hint = f"; {root.resolve().parent} holds both images and masks: name it"
    elif len(deep) > 1:
        hint = f"; if {list_some([folder.name for folder in deep], 3)} are classes, whose pictures lie in folders below: --task classify"
    raise DataError(f"{root} holds nothing to make {recipe} of{reason}: {EXPECTED}{hint}")


def training_pictures(layout: Layout) -> Mapping[str, PictureFile]:
    """The training pictures by the key that decides their split, as in `Item`."""
    if layout.shards is not None:
        return {key: file for (_, key), file in layout.shards.pictures.items()}
    return ANSWERING[layout.task].folders.training_pictures(layout)


def _shard_layout(root: Path, task: Task | None) -> Layout | None:
    """The shards in `root`, if it holds any. Raises DataError if they are for another task."""
    places: dict[str, Path | None] = {role: _shards_named(root, role) for role in ("train", "validation", "test")}
    base = places["train"] or (root if any(_is_shard(path) for path in root.iterdir()) else None)
    if base is None:
        return None
    content = shard_content(shard_files(base))
    if task not in (None, content.task) or not content.pictures:
        holds = f"masks for {content.task}" if content.masks else f"{count(len(content.labels), 'class')} and no masks"
        raise DataError(f"the shards {base} hold {count(len(content.pictures), 'picture')}, {holds}: {EXPECTED}")
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
