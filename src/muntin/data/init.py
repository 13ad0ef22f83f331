"""`muntin init`: looks at a folder of pictures and writes a recipe for it, explained line by line.

Recognised, names in any case: `images/` and `masks/`; `train/`, `val/` and `test/` that hold these; for classification, folders
named after the classes, with or without `train/`, `val/` and `test/` around them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from muntin.data.colors import distinct_colors
from muntin.data.folders import RGB, RUNS, FolderPair, filling_seed, is_text
from muntin.data.source import MAX_CLASSES, DataTask, SplitName
from muntin.errors import DataError, RecipeError
from muntin.runtime.images import IGNORED, IMAGE_SUFFIXES, image_size, read_image, read_mask, write_whole

RECIPE_NAME = "recipe.yaml"
SHARE = 0.15  # of the pictures, for validation and for test each, where they have no folders
_LOOKED_AT = 64  # files opened to find out what masks hold, how large pictures are
_LOSSY = (".jpg", ".jpeg")
_SOFT, _ENDS = 8, 0.9  # values between 0 and 255 beyond which edges are smoothed, where these two have so much of the pixels
_FEW, _FAR = 4, 63  # values beside 255 that are still greys to look at where the highest is beyond it
_NAMES: dict[str, tuple[str, ...]] = {
    "images": ("images", "image", "imgs", "img"),
    "masks": ("masks", "mask", "labels", "annotations"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_LAYOUT = (
    "expected images/ and masks/ (or train/, val/ and test/ that hold these), or for classification one folder of images a class, "
    f"with images as {', '.join(IMAGE_SUFFIXES)}"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was found: the folders of the training pictures, and of the other splits where they have their own."""

    task: DataTask
    base: FolderPair
    validation: FolderPair | None
    test: FolderPair | None


@dataclass(frozen=True, kw_only=True)
class FoundClass:
    """A class to be written: what stands for it in the masks (None for `classify`), its name and colour."""

    name: str
    color: RGB
    value: int | RGB | None = None


def write_recipe(directory: Path | str, *, task: DataTask | None = None, output: Path | None = None) -> Path:
    """Writes `recipe.yaml` into the user's folder and returns its path. `task` None: segmentation where there are masks.

    `output`: another file in place of it, that names the folders by their whole paths. Opens up to 64 masks and images, no more. Raises
    RecipeError when the recipe is there already or may not be written, DataError when the folder holds nothing usable or too few pictures
    to split.
    """
    root = Path(directory) if output is None else Path(directory).resolve()
    path = root / RECIPE_NAME if output is None else output
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: name a file in it")
    if path.exists():
        raise RecipeError(f"{path} exists already: edit it, or move it away and run init again")
    if root.is_dir() and not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise RecipeError(f"{path} cannot be written: name a file in a folder that may be written to by --output")
    layout = find_layout(root, task)
    pictures = _sampled(_keyed_pictures(layout))
    classes, ignore = _mask_classes(layout.base.masks) if layout.base.masks is not None else (_folder_classes(layout.base.images), None)
    text = recipe_text(
        file=path.name,
        name=run_name(root.resolve().name),
        layout=layout,
        root=root if output is None else None,
        classes=classes,
        ignore=ignore,
        channels=_channels(pictures),
        crop=_crop(pictures, layout.task),
        seed=_seed(layout),
    )
    wrong = next((line.strip() for line in text.splitlines() if not is_text(line)), None)
    if wrong is not None:
        raise DataError(f"{str(root)!a}: a name in it is no UTF-8 (the recipe would say {wrong!a}): rename the folder")
    write_whole(path, text.encode())
    return path


def remarks(images: Path, masks: Path | None) -> list[str]:
    """What somebody may not expect of a recipe for these folders, a line each: class folders without pictures of their own, folders named
    as a split that are none, and masks in which 255 may stand for a class and is ignored."""
    if masks is None:
        passed = {folder.name: _deeper(folder) for folder in _folders(images) if not _pictures(folder)}
        deep = {name: inside for name, inside in passed.items() if inside and name != RUNS}
        told = "is no class: it holds no pictures itself, its folders do"
        shown = {name: ", ".join(inside[:3] + ["..."] * (len(inside) > 3)) for name, inside in deep.items()}
        return [f"{name} {told} ({inside}): move them up if it is one" for name, inside in shown.items()]
    notes = []
    for name in ("validation", "test"):
        folder = _folder(images.parent, name)
        if folder is not None and not _pair(folder) and (_pictures(folder) or _folder(folder, "images") or _folder(folder, "masks")):
            notes.append(
                f"{folder.name}/ holds no images/ and masks/ with files in them, and is not used: {name} gets a share of the others"
            )
    values = [set(np.unique(mask).tolist()) for path in _masks_looked_at(masks) if (mask := read_mask(path)).ndim == 2]
    ignored = [held for held in values if IGNORED in held]
    if not ignored or any(held - {0, IGNORED} for held in ignored) or not any(held - {0, IGNORED} for held in values):
        return notes
    return [
        *notes,
        f"255 counts as nothing, and the {len(ignored)} of {len(values)} masks that hold it hold no class but 0: where it stands for a "
        "class, write the number that the others have",
    ]


def _deeper(folder: Path) -> list[str]:
    return [inside.name for inside in _folders(folder) if _pictures(inside)]


def run_name(folder: str) -> str:
    """A folder's name with what a run may not be called replaced by dashes; `mine` where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._") or "mine"


def find_layout(root: Path, task: DataTask | None) -> Layout:
    """The folders in `root` that a recipe can name. Raises DataError when there are none."""
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist: name the folder that holds your pictures")
    train = _folder(root, "train")
    others = {name: _folder(root, name) for name in ("validation", "test")}
    pairs = {name: folder if folder is not None and _pair(folder) else None for name, folder in others.items()}
    for base in (root,) if train is None else (train, root):
        # beside the pictures a folder of that name may be anything (`remarks` tells of it); beside those to train on it is meant
        layout = _segment_layout(base, pairs if base is root else others) if task != "classify" else None
        if layout is None and task != "segment":
            # beside folders of classes a folder of that name may be a class
            layout = _classify_layout(base, dict.fromkeys(others) if base is root else others, asked=task is not None)
        if layout is not None:
            return layout
    alone = [folder for folder in _folders(root if train is None else train) if _pictures(folder)]
    found = f" (it has one folder with pictures, {alone[0].name}: two classes at least can be told apart)" if len(alone) == 1 else ""
    wanted = "a recipe" if task is None else f"a {task} recipe"
    raise DataError(f"{root} holds nothing to make {wanted} of{found}: {_LAYOUT}")


def _segment_layout(base: Path, others: dict[str, Path | None]) -> Layout | None:
    pair = _pair(base)
    if pair is None:
        return None
    own = {name: None if folder is None else _pair(folder) for name, folder in others.items()}
    for name, folder in others.items():
        if folder is not None and own[name] is None:
            raise DataError(f"{folder} holds no images/ and masks/ with files in them, {base} does: {_LAYOUT}")
    return Layout(task="segment", base=pair, validation=own["validation"], test=own["test"])


def _classify_layout(base: Path, others: dict[str, Path | None], *, asked: bool) -> Layout | None:
    named = [folder for folder in _folders(base) if _pictures(folder)]
    if len(named) < 2:
        return None
    strange = next((folder for folder in named if any(folder.name.lower() in names for names in _NAMES.values())), None)
    if strange is not None and not asked:
        raise DataError(
            f"{strange} has the name of a split, of images or of masks, and lies beside others that do not fit: {_LAYOUT}; if it is a "
            "class, say so by --task classify"
        )
    own = {name: None if folder is None else FolderPair(images=folder) for name, folder in others.items()}
    return Layout(task="classify", base=FolderPair(images=base), validation=own["validation"], test=own["test"])


TAIL = [
    "",
    "model:",
    "  name: hybrid-s  # hybrid-xs and hybrid-xxs are smaller and faster, hybrid-m is larger; `muntin models` lists them all",
    "",
    "training:",
    "  steps: 2000  # batches to train on; `minutes: 30` beside it ends the run then, if it has not ended before",
    "  batch_size: 16  # crops in a batch; halve it if memory runs out",
    "  learning_rate: 0.004  # the highest; it warms up to it and falls along a cosine",
    "  precision: auto  # 16-bit where this machine is fast at it; fp32 to switch that off",
    "",
    "quantization:",
    "  calibration_images: 64  # training crops that set the ranges of the 8-bit numbers",
    "",
    "compression:  # `muntin compress` after `muntin fit`: low rank, 4-bit weights, more bits where needed; later by its --set alone",
    "  low_rank: {parameters: 0.35}  # share of the parameters to keep; null: keep the layers as they are",
    "  average_bits: 4.8  # of a weight; 4 is the least, more is larger",
    "",
]


def _head(name: str, task: str, file: str) -> list[str]:
    return [
        "# A recipe for muntin, written by `muntin init`. Check the names below, then run",
        f"#     muntin fit {shlex.quote(file)}     (with the path from where you are: `runs/` is made there)",
        "# Its progress line tells how long it will take. What is left out has its default, which may be another value than the one here;",
        "# docs/recipe.md lists all keys with theirs.",
        "",
        f"name: {_text(name)}  # the run's results go to runs/ under this name",
        f"task: {task}  # segment: a class for every pixel; classify: one class for the picture",
        "seed: 0  # another number is another run: the spread between seeds shows what a difference is worth",
        "",
        "data:",
        "  source: folders  # your own pictures; `earth` is the built-in demonstration",
    ]


def recipe_text(
    *,
    file: str = RECIPE_NAME,
    name: str,
    layout: Layout,
    root: Path | None,
    classes: Sequence[FoundClass],
    ignore: int | RGB | None,
    channels: int,
    crop: int,
    seed: int,
) -> str:
    """The recipe as YAML with comments; paths relative to `root`, or whole ones."""
    data = [
        f"  images: {_quoted(layout.base.images, root)}  # relative paths start at this file's folder",
        *(
            []
            if layout.base.masks is None
            else [f"  masks: {_quoted(layout.base.masks, root)}  # a mask has the stem of its image: a.jpg and a.png"]
        ),
        _split_line("validation", "is scored while it trains and chooses nothing", layout.validation, layout, root),
        _split_line("test", "is looked at once, at the end", layout.test, layout, root),
    ]
    if layout.validation is None or layout.test is None:
        data.append(f"  seed: {seed}  # decides which pictures go where; adding pictures moves none of the others")
    if layout.task == "segment":
        data += [
            f"  ignore: {_value(ignore)}  # the mask value that counts as nothing; null: there is none",
            "  classes:  # in order; `value` is what the masks hold, `color` how muntin paints it (red, green, blue): rename them",
        ]
        if (looked := looked_at(layout.base.masks)) is not None:
            data.append("    # seen in {} of {} masks: add what others hold".format(*looked))
    else:
        data.append("  classes:  # each has the name of its folder; `color` is how charts paint it (red, green, blue)")
    data += [
        f"    - {{name: {_text(entry.name)}"
        + ("" if entry.value is None else f", value: {_value(entry.value)}")
        + f", color: {_value(entry.color)}}}"
        for entry in classes
    ]
    data += [
        f"  channels: {channels}  # of the images: 3 is colour, 1 grey; up to 16 in .npy files",
        f"  crop: {crop}  # pixels a side of the random squares that are trained on; larger sees more context and is slower",
        *(
            ["  rare: 0.25  # share of the crops centred on a class drawn evenly: rare classes are seen more often"]
            if layout.task == "segment"
            else []
        ),
        "  augmentation:  # random changes to the crops, so that the model does not learn the pictures by heart",
        "    flip_horizontal: 0.5  # probability, 0-1",
        "    flip_vertical: 0.0  # 0.5 suits pictures taken from above: satellites, microscopes",
        "    scale: [0.8, 1.25]  # zoom between these factors",
    ]
    return "\n".join(_head(name, layout.task, file) + data + TAIL)


def _split_line(name: SplitName, use: str, pair: FolderPair | None, layout: Layout, root: Path | None) -> str:
    if pair is None:
        own = "{images: ...}" if layout.task == "classify" else "{images: ..., masks: ...}"
        return f"  {name}: {SHARE}  # share of the pictures that {use}; or {own}, folders of its own"
    masks = "" if pair.masks is None else f", masks: {_quoted(pair.masks, root)}"
    return f"  {name}: {{images: {_quoted(pair.images, root)}{masks}}}  # {use}"


def _quoted(path: Path, root: Path | None) -> str:
    return _text((path if root is None else path.relative_to(root)).as_posix())


def _text(text: str) -> str:
    """It in quotes; escaped where YAML takes it for something else or for nothing, as DEL or a line's end in a folder's name. What is no
    UTF-8 stays, and is refused when it is written."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() or "\ud800" <= c <= "\udfff" else f"\\u{ord(c):04x}" if ord(c) <= 0xFFFF else f"\\U{ord(c):08x}"
        for c in quoted
    )


def _value(value: int | RGB | None) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


# ---- what the folder holds ----


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder(parent: Path, role: str) -> Path | None:
    named = {path.name.lower(): path for path in _folders(parent)}
    return next((named[name] for name in _NAMES[role] if name in named), None)


def _pair(folder: Path) -> FolderPair | None:
    images, masks = _folder(folder, "images"), _folder(folder, "masks")
    return FolderPair(images=images, masks=masks) if images and masks and _pictures(images) and _pictures(masks) else None


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _keyed_pictures(layout: Layout) -> dict[str, Path]:
    """Training pictures under the keys that decide their split, as `FolderSource` names them."""
    if layout.task == "segment":
        return {path.stem: path for path in _pictures(layout.base.images)}
    return {f"{folder.name}/{path.stem}": path for folder in _folders(layout.base.images) for path in _pictures(folder)}


def looked_at(masks: Path | None) -> tuple[int, int] | None:
    """In how many masks of a folder, of how many, classes are looked for; None: in all."""
    found = [] if masks is None else list({path.stem: path for path in _pictures(masks)}.values())
    looked = len(_sampled({path.stem: path for path in found})) if found else 0
    return None if looked == len(found) else (looked, len(found))


def _masks_looked_at(folder: Path) -> list[Path]:
    return _sampled({path.stem: path for path in _pictures(folder)})


def _sampled(pictures: dict[str, Path]) -> list[Path]:
    """At most `_LOOKED_AT` of them, evenly over the list."""
    paths = list(pictures.values())
    return paths[:: -(-len(paths) // _LOOKED_AT)]


def _channels(pictures: Sequence[Path]) -> int:
    """3 unless all pictures agree on another number that muntin takes as it is: grey, whatever .npy files hold, or the four channels of
    TIFFs whose fourth is not the same all over each, as that of an opaque picture is."""
    read = [read_image(path, None) for path in pictures]
    found, suffixes = {image.shape[2] for image in read}, {path.suffix.lower() for path in pictures}
    if len(found) == 1 and (1 in found or suffixes == {".npy"}):
        return int(found.pop())
    fourth = found == {4} and suffixes <= {".tif", ".tiff"} and any(np.ptp(image[:, :, 3]) for image in read)
    return 4 if fourth else 3


def _crop(pictures: Sequence[Path], task: DataTask) -> int:
    """Of the shorter sides' median the multiple of 32 below it, from 32 to 256, or to 224 for `classify`."""
    side = median(min(image_size(path)) for path in pictures)
    largest = 256 if task == "segment" else 224
    return min(largest, max(32, int(side) // 32 * 32))


def _seed(layout: Layout) -> int:
    """The first seed with which no split is empty, and splits lack as few classes as can be."""
    shares: dict[SplitName, float] = {}
    if layout.validation is None:
        shares["validation"] = SHARE
    if layout.test is None:
        shares["test"] = SHARE
    keys = list(_keyed_pictures(layout))
    seed = filling_seed(keys, shares, classes=layout.task == "classify")
    if seed is None:
        raise DataError(f"{layout.base.images} holds {len(keys)} pictures, too few to split into {1 + len(shares)} parts: add pictures")
    return seed


def _folder_classes(folder: Path) -> list[FoundClass]:
    names = [path.name for path in _folders(folder) if _pictures(path)]  # a run's folder, `runs`, holds none
    return [FoundClass(name=name, color=color) for name, color in zip(names, distinct_colors(len(names)), strict=True)]


def _mask_classes(folder: Path) -> tuple[list[FoundClass], int | RGB | None]:
    """The classes that the masks hold, and which value is ignored: 255, where it is no class itself."""
    paths = _masks_looked_at(folder)
    masks = [read_mask(path) for path in paths]
    painted = any(mask.ndim == 3 and not (mask == mask[:, :, :1]).all() for mask in masks)
    if painted:
        _refuse_lossy(paths, folder)
        colors = _colors_in([read_mask(path, colors=True) for path in paths])
        _check_count(colors, folder)
        return [FoundClass(name=f"class-{index}", color=color, value=color) for index, color in enumerate(colors)], None
    counts = _counts_in(masks)
    values = sorted(counts)
    _check_sharp(counts, paths, folder)
    ignore = None if _is_a_class(IGNORED, values) else IGNORED
    if values[0] < 0 or values[-1] > 65535:
        raise DataError(f"the masks in {folder} hold values from {values[0]} to {values[-1]}: classes are numbers from 0 to 65535")
    values = [value for value in values if value != ignore]
    _check_count(values, folder)
    colors = _palette_colors(paths, values) or list(distinct_colors(len(values)))
    return [
        FoundClass(name=f"class-{index}", color=color, value=value) for index, (value, color) in enumerate(zip(values, colors, strict=True))
    ], ignore


def _counts_in(masks: Sequence[np.ndarray[Any, Any]]) -> dict[int, int]:
    """How many pixels have each value."""
    counts: dict[int, int] = {}
    for mask in masks:
        for value, count in zip(*np.unique(mask, return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)
    return counts


def _check_sharp(counts: Mapping[int, int], paths: Sequence[Path], folder: Path) -> None:
    """Raises DataError for masks of two classes whose edges run through all values between: each would be a class of its own."""
    ends = counts.get(0, 0) + counts.get(255, 0)
    between = [value for value in counts if value not in (0, 255)]
    soft = len(between) > _SOFT and max(between) > 127 and min(between) < 128 and ends > _ENDS * sum(counts.values())
    if between:
        _refuse_lossy(paths, folder)
    if soft:
        raise DataError(
            f"the masks in {folder} hold the values {', '.join(map(str, sorted(counts)[:4]))}, ... ({len(counts)} in all): "
            "their edges were smoothed, as by resizing; save them as PNG of whole class numbers, resized by nearest neighbour; "
            "if they are of two classes, cut them at 128"
        )


def _refuse_lossy(paths: Sequence[Path], folder: Path) -> None:
    """Raises DataError where a mask was stored with loss: its classes have run into each other."""
    blurred = next((path for path in paths if path.suffix.lower() in _LOSSY), None)
    if blurred is not None:
        raise DataError(
            f"{folder}: {blurred.name} is a JPEG, which blurs classes into each other; save masks as PNG "
            "(if they are of two classes, cut them at 128)"
        )


def _is_a_class(value: int, values: Sequence[int]) -> bool:
    """Whether 255 is a class beside the others, as in masks that are to be looked at (0, 255; 0, 128, 255), where others are no numbers of
    classes, which count up from 0: a few of them may be as far apart as `_FAR` by chance, many further."""
    others = [other for other in values if other != value]
    far = _FAR if len(others) <= _FEW else 127
    return value in values and (others == [0] or max(others, default=0) > max(far, 2 * len(others)))


def _check_count(values: Sequence[object], folder: Path) -> None:
    if len(values) > MAX_CLASSES:
        raise DataError(f"the masks in {folder} hold {len(values)} values, more than {MAX_CLASSES}: save them as PNG (JPEG blurs them)")
    if len(values) < 2:
        raise DataError(f"the masks in {folder} hold {len(values)} value: two classes at least are needed to tell apart")


def _colors_in(masks: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> list[RGB]:
    codes: set[int] = set()
    for mask in masks:
        wide = mask.astype(np.int32)
        codes.update(np.unique(wide[:, :, 0] << 16 | wide[:, :, 1] << 8 | wide[:, :, 2]).tolist())
    return [(code >> 16, code >> 8 & 255, code & 255) for code in sorted(codes)]


def _palette_colors(paths: Sequence[Path], values: Sequence[int]) -> list[RGB] | None:
    """The colours that the masks' own palettes give the values, or None where there are none or two are alike."""
    found: dict[int, RGB] = {}
    for path in paths:
        mask = read_mask(path)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            return None
        painted = read_mask(path, colors=True)
        for value, first in zip(*np.unique(mask, return_index=True), strict=True):
            red, green, blue = painted.reshape(-1, 3)[first].tolist()
            found.setdefault(int(value), (red, green, blue))
    colors = [found[value] for value in values]
    greys = all(len(set(color)) == 1 for color in colors)
    return colors if not greys and len(set(colors)) == len(colors) else None
