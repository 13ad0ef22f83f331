"""Find photographs for `restore` in a user's folder, and what a recipe says of them (`muntin init --task restore`).

Recognised, names in any case: pictures in the folder itself or in its `images/` (or `clean/`), which are degraded by the recipe; `images/`
and `targets/` with the degraded and the clean pictures of the same stems; both also in `train/`, `val/` and `test/`. Pictures in subfolders
of these count, too.
"""

from __future__ import annotations

from pathlib import Path

from muntin.data.classes import list_some
from muntin.data.folders import FolderPair, folders_apart
from muntin.data.layout import Layout
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES
from muntin.images.listing import FOLDER_NAMES, composed, pictures_below, subfolders
from muntin.text import count

_IMAGES = (*FOLDER_NAMES["images"], "photos", "photographs", "pictures", "degraded", "noisy", "lr")
_TARGETS = FOLDER_NAMES["targets"]
_EXPECTED = (
    "expected photographs in it, in images/ or in clean/; or images/ and targets/, the degraded and the clean pictures of the same names; "
    f"also in train/, val/ and test/, with images as {', '.join(IMAGE_SUFFIXES)}"
)


def restore_layout(root: Path) -> Layout:
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
