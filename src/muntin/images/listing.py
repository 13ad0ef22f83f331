"""List images and folders in a user's directory, and recognise folders by their names. The one place that does, for all commands."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

from muntin.errors import DataError
from muntin.images.opening import IMAGE_SUFFIXES

FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "images": ("images", "image", "imgs", "img"),
    "masks": ("masks", "mask", "labels", "annotations"),
    "targets": ("targets", "target", "clean", "gt", "hr", "sharp"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The names of folders, in any case, by what they hold."""
_PREDICTIONS = "predictions"  # the folder of `muntin predict`, if none is named
_RUNS = "runs"  # the folder that `muntin fit` writes results to; it may lie beside the pictures


def entries(folder: Path) -> list[Path]:
    """Files and folders in `folder` in order of their names, without hidden ones. Raises DataError if it is not a folder."""
    if not folder.exists():
        raise DataError(f"the folder {folder} does not exist: check the path; relative paths start at the recipe's folder")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the folder that holds the files")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def subfolders(folder: Path) -> list[Path]:
    """Folders in `folder`, in order of their names, without hidden ones."""
    return [path for path in entries(folder) if path.is_dir()]


def pictures(folder: Path) -> list[Path]:
    """Image files directly in `folder`, in order of their names, without hidden ones."""
    return [path for path in entries(folder) if is_picture(path)]


def folder_named(parent: Path, role: str) -> Path | None:
    """The folder in `parent` that has one of the names for `role`, a key of `FOLDER_NAMES`."""
    by_name = {path.name.lower(): path for path in subfolders(parent)}
    return next((by_name[name] for name in FOLDER_NAMES[role] if name in by_name), None)


def image_folder_pair(folder: Path, role: str = "masks") -> tuple[Path, Path] | None:
    """The folders of images and of masks (`role`) in `folder`, if both hold image files."""
    images, others = folder_named(folder, "images"), folder_named(folder, role)
    if images is None or others is None:
        return None
    places = paired_folders(images, others)
    both = any(pictures(folder) for _, folder, _ in places) and any(pictures(folder) for *_, folder in places)
    return (images, others) if both else None


def paired_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks in `root` by split; "validation" and "test" only if they have folders of their own.

    Empty unless `root`, or its folder train/, holds images/ and masks/ (`image_folder_pair`).
    """
    for base in (folder_named(root, "train"), root):
        if base is not None and (pair := image_folder_pair(base)) is not None:
            folders = {name: folder_named(root, name) for name in ("validation", "test")}
            own = {name: image_folder_pair(folder) for name, folder in folders.items() if folder is not None}
            return {"train": pair} | {name: pair for name, pair in own.items() if pair is not None}
    return {}


def images_in(folder: Path, *, suffixes: Collection[str] = IMAGE_SUFFIXES) -> tuple[list[Path], tuple[str, ...]]:
    """The images in `folder` and in all folders in it, and notes on what was left out. For commands that read no masks.

    Where a folder holds images/ and masks/, or targets/, only its images/, train/, val/ and test/ are read, as `muntin fit` reads it.
    Hidden folders and folders of results (`holds_results`) are left out. Each folder counts once, links included.
    """
    found, notes, seen = list[Path](), list[str](), set[Path]()

    def walk(folder: Path) -> None:
        if (real := folder.resolve()) in seen:
            return
        seen.add(real)
        inside = entries(folder)
        folders = [path for path in inside if path.is_dir()]
        pair = image_folder_pair(folder) or image_folder_pair(folder, "targets") if len(folders) > 1 else None
        if pair is None:
            found.extend(path for path in inside if path.suffix.lower() in suffixes and path.is_file())
        else:
            splits = [path for name in ("train", "validation", "test") if (path := folder_named(folder, name)) is not None]
            read, more = ", ".join(f"{path.name}/" for path in (pair[0], *splits)), len(inside) - len(splits) - 2
            notes.append(f"{folder}: read {read}; left out {pair[1].name}/{f' and {more} more' if more else ''}")
            folders = [pair[0], *splits]
        for path in folders:
            if holds_results(path):
                notes.append(f"{path}: left out, since it has the name or the files of a folder of results")
            else:
                walk(path)

    walk(folder)
    return found, tuple(notes)


def paired_folders(images: Path, masks: Path) -> list[tuple[str, Path, Path]]:
    """The folders of images and masks, and all folders below that lie in both at the same place: (place, images, masks), place "" first.

    A place is a relative path with slashes, in form NFC. A link to a folder that is on the list already is left out.
    """
    found: list[tuple[str, Path, Path]] = []
    seen: set[Path] = set()

    def walk(place: str, images: Path, masks: Path) -> None:
        seen.add(images.resolve())
        found.append((place, images, masks))
        inner_masks = {composed(path.name): path for path in subfolders(masks)}
        for path in subfolders(images):
            name = composed(path.name)
            if name in inner_masks and path.resolve() not in seen:
                walk(f"{place}/{name}".lstrip("/"), path, inner_masks[name])

    walk("", images, masks)
    return found


def folders_below(folder: Path, *, apart: Collection[Path] = ()) -> list[tuple[str, Path]]:
    """A folder and all folders in it, as (place, path) like `paired_folders`. `apart`: resolved folders that are left out.

    So are folders of results (`holds_results`).
    """
    found: list[tuple[str, Path]] = []
    seen = set(apart)

    def walk(place: str, folder: Path) -> None:
        if (real := folder.resolve()) in seen:
            return
        seen.add(real)
        found.append((place, folder))
        for path in subfolders(folder):
            if not holds_results(path):
                walk(f"{place}/{composed(path.name)}".lstrip("/"), path)

    walk("", folder)
    return found


def pictures_below(folder: Path, *, apart: Collection[Path] = ()) -> dict[Path, str]:
    """The pictures in a folder and in all folders in it, with their names: place and stem, such as `2024/a`."""
    places = folders_below(folder, apart=apart)
    return {path: f"{place}/{path.stem}".lstrip("/") for place, inside in places for path in pictures(inside)}


def is_picture(path: Path) -> bool:
    """Return True for a file with the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def is_results_folder(folder: Path) -> bool:
    """Return True for the folder of the results of `muntin fit`: it is called `runs` and holds no pictures."""
    return folder.name == _RUNS and not pictures(folder)


def holds_results(folder: Path) -> bool:
    """Return True for a folder that muntin wrote: `runs` without pictures of its own, a run, or the `predictions` of `muntin predict`."""
    return is_results_folder(folder) or folder.name == _PREDICTIONS or (folder / "checkpoints").is_dir()


def composed(name: str) -> str:
    """`name` in Unicode's form NFC, for comparisons: some file systems store a letter and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def is_utf8(name: str) -> bool:
    """Return True if a file name is valid UTF-8. Python keeps invalid bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
