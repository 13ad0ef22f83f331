"""List pictures and folders in a user's directory, and compare their names."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES

RECIPE_NAME = "recipe.yaml"
"""The file that `muntin init` writes; it may lie beside the pictures."""
EMPTY_MARK = ".no-pictures"
"""A file in the folder of a class that has no training pictures on purpose; updates write it."""
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
