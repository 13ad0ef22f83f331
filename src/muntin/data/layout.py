"""Find the folders of images, masks and classes in a user's directory.

Recognised, names in any case: `images/` and `masks/`; `train/`, `val/` and `test/` that hold these; for classification, folders
named after the classes, with or without `train/`, `val/` and `test/` around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from muntin.data.folders import FolderPair
from muntin.data.listing import is_results_folder, pictures, subfolders
from muntin.data.source import DataTask, SplitName
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES

_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "images": ("images", "image", "imgs", "img"),
    "masks": ("masks", "mask", "labels", "annotations"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_EXPECTED = (
    "expected images/ and masks/ (or train/, val/ and test/ that hold these), or for classification one folder of images for each class, "
    f"with images as {', '.join(IMAGE_SUFFIXES)}"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of the training pictures, and of validation and test where these have folders of their own."""

    task: DataTask
    base: FolderPair
    validation: FolderPair | None
    test: FolderPair | None

    def training_pictures(self) -> dict[str, Path]:
        """The training pictures by the key that decides their split, as in `folders.Item`."""
        if self.task == "segment":
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
    with_pictures = [folder for folder in subfolders(root if train is None else train) if pictures(folder)]
    reason = (
        f" (it has one folder with pictures, {with_pictures[0].name}: at least two classes are needed)" if len(with_pictures) == 1 else ""
    )
    raise DataError(f"{root} holds nothing to make {'a recipe' if task is None else f'a {task} recipe'} of{reason}: {_EXPECTED}")


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
            names = ", ".join(inner[:3] + ["..."] * (len(inner) > 3))
            notes.append(
                f"{folder.name} is not a class: only its subfolders ({names}) hold pictures; if it is a class, move them up into it"
            )
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
    reserved = next((folder for folder in class_folders if any(folder.name.lower() in names for names in _FOLDER_NAMES.values())), None)
    if reserved is not None and not task_given:
        raise DataError(
            f"{reserved} has the name of a split, of images or of masks, and lies beside folders that do not fit it: {_EXPECTED}; if it is "
            "a class, use --task classify"
        )
    splits = {name: None if folder is None else FolderPair(images=folder) for name, folder in split_folders.items()}
    return Layout(task="classify", base=FolderPair(images=base), validation=splits.get("validation"), test=splits.get("test"))


def _folder_named(parent: Path, role: str) -> Path | None:
    """The folder in `parent` that has one of the names for `role`."""
    by_name = {path.name.lower(): path for path in subfolders(parent)}
    return next((by_name[name] for name in _FOLDER_NAMES[role] if name in by_name), None)


def _pair_in(folder: Path) -> FolderPair | None:
    """The folders of images and masks in `folder`, if both hold pictures."""
    images, masks = _folder_named(folder, "images"), _folder_named(folder, "masks")
    return FolderPair(images=images, masks=masks) if images and masks and pictures(images) and pictures(masks) else None
