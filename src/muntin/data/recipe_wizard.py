"""Write a recipe for a folder of pictures (`muntin init`), with a comment on each line."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from muntin.artifact.answers import ANSWERS, Task
from muntin.data.inspection import (
    LOOK_S,
    MaskClasses,
    classes_in_folders,
    classes_in_masks,
    crop_side,
    ignored_value_notes,
    mask_facts,
    picture_channels,
    picture_facts,
    read_some,
    size_errors,
)
from muntin.data.layout import equal_stem_notes, find_layout, training_pictures
from muntin.data.shards.inspection import shard_classes
from muntin.data.splits import filling_seed
from muntin.errors import DataError, RecipeError
from muntin.images import write_whole
from muntin.images.listing import composed, folders_below, is_utf8, paired_folders, pictures, pictures_below, subfolders
from muntin.images.opening import PictureFile
from muntin.tasks.classes import as_yaml
from muntin.tasks.classify.folders import folders_of_classes, nested_class_notes
from muntin.tasks.folders import RECIPE_NAME, FolderPair, Layout, SplitName
from muntin.tasks.restore.folders import restore_lines, restore_notes
from muntin.tasks.segment.folders import unpaired_notes, unused_split_notes
from muntin.text import count, list_some

_SHARE = 0.15  # share of the pictures for a split without a folder of its own
FEW_PIXELS = 0.02
"""Share of the pixels below which a class is called rare."""
FEW_PICTURES = 1 / 3
"""Share of the most frequent class's pictures below which a class is called rare."""
_MAX_REASONS, _MAX_FILES = 12, 12  # reasons in the notes on files that cannot be read, and names for each
_FIRST_MODEL = "hybrid-xxs  # the fastest, for a first result; hybrid-xs,"
_FIRST_RESTORER = """hybrid-xs
  options: {stem: [WIDE, 48, 64], pairs: [1, 1], decoder: WIDE, dims: [128], depths: [1], finest: 2}  # ends at half of the sides
  #"""
_CLASS_LOSS = """\
  loss: cross-entropy  # or focal, dice, dice-cross-entropy (the last two with masks only), where rare classes are missed
  class_weights: null  # auto: rare classes count more, by their shares of the training data; or {NAME: WEIGHT}
"""
_STEPS_TIME = ": about four minutes of the small model on two fast cores; a larger model needs more of both"
_AFTER_DATA = f"""
model:
  name: hybrid-xxs  # the fastest, for a first result; hybrid-xs, hybrid-s and hybrid-m are larger; `muntin models` lists them all

training:
  steps: 2000  # batches to train on{_STEPS_TIME}
  minutes: 10  # training ends after so many minutes at the latest; null: no limit. A run that reaches it differs from the next one
  batch_size: 16  # crops in a batch; halve it if memory runs out
{_CLASS_LOSS}\
  patience: null  # validations without a better score after which training ends; the best weights are kept in any case
  learning_rate: 0.004  # the highest rate; it rises to this value, then falls along a cosine
  precision: auto  # 16-bit where this machine is fast at it; fp32 to switch that off

quantization:
  calibration_images: 64  # training crops that set the ranges of the 8-bit numbers

compression:  # `muntin compress` after `muntin fit`: the smallest model of those that it tries; change later by its options
  max_drop: null  # the most that the score may lose; by default 0.01 of mIoU or accuracy, 0.1 dB of PSNR
  trials: 12  # most models to try; each is trained for half of the steps above, exported and scored
"""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Contents of a user's folder. Images and masks were opened for `LOOK_S` seconds each."""

    layout: Layout
    classes: MaskClasses
    """For `classify`, the shares are those of the class folders' images."""
    counted: int
    """Masks that the classes and shares are from; for `classify`, images in the class folders, which were counted and not opened."""
    unopened: int
    """Masks that were not opened."""
    opened: int
    """Images that were opened."""
    channels: int
    crop: int
    unreadable: Mapping[PictureFile, DataError]
    """Images and masks that cannot be read, with the reason. The recipe leaves them out."""
    notes: tuple[str, ...]


def write_recipe(directory: Path | str, *, task: Task | None = None, output: Path | None = None) -> tuple[Path, Survey]:
    """Write `recipe.yaml` into the user's folder. Returns its path, and what was seen in the folder. Reads images and masks for at most
    `LOOK_S` seconds each.

    `task` None: segmentation if there are masks, else classification; restore by name only. `output`: the file to write instead, with
    absolute paths. Raises RecipeError if the recipe exists or cannot be written, DataError if the folder holds nothing usable or too few
    pictures to split.
    """
    root = Path(directory) if output is None else Path(directory).resolve()
    path = root / RECIPE_NAME if output is None else output
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: name a file in it")
    if path.exists():
        raise RecipeError(f"{path} exists already: edit it, or move it away and run init again")
    if root.is_dir() and not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise RecipeError(f"{path} cannot be written: use --output to name a file in a folder that you may write to")
    if output is not None and not (is_utf8(str(root)) and is_utf8(output.name)):
        raise DataError(f"{str(root)!a} or {str(output)!a} is not valid UTF-8, so a recipe cannot name it: rename it")
    survey = _survey(find_layout(root, task))
    write_whole(path, _recipe_text(survey, root, file=path.name, absolute=output is not None).encode())
    return path, survey


def _survey(layout: Layout) -> Survey:
    base = layout.base
    pairs = [pair for pair in (base, layout.validation, layout.test) if pair is not None]
    images = list(training_pictures(layout).values())
    facts, unreadable = read_some(images, picture_facts)
    unopened_images = len(images) - len(facts) - len(unreadable)
    if layout.shards is not None:
        content, failed = layout.shards, list(layout.shards.failures.values())
        notes, folders = [f"{failure.reason}; `muntin fit` refuses them" for failure in failed[:_MAX_REASONS]], []
        classes, counted, unopened, unreadable_masks = shard_classes(content, base.images)
        unreadable |= unreadable_masks
    elif not layout.answer.has_classes:
        classes, counted, unopened = MaskClasses(classes=(), ignore=None, shares=()), len(images), 0
        own = [folder for pair in pairs for folder in (pair.images, pair.targets) if folder is not None]
        notes, folders = restore_notes(layout), [inside for folder in own for _, inside in folders_below(folder, apart=layout.apart())]
    elif base.masks is None:
        class_folders = folders_of_classes(base.images, deep=layout.deep)
        specs = classes_in_folders(base.images, class_folders)
        numbers = [len(pictures_below(folder)) for folder in class_folders]
        counted, unopened = sum(numbers), 0
        classes = MaskClasses(classes=tuple(specs), ignore=None, shares=tuple(number / counted for number in numbers))
        notes = [] if layout.deep else nested_class_notes(base.images)
        folders = [inside for pair in pairs for folder in subfolders(pair.images) for _, inside in folders_below(folder)]
    else:
        places = [place for pair in pairs if pair.masks is not None for place in paired_folders(pair.images, pair.masks)]
        mask_files = [path for *_, folder in places for path in pictures(folder)]
        masks, unreadable_masks = read_some(list[PictureFile](mask_files), mask_facts)
        unreadable |= unreadable_masks
        by_stem = {(place, composed(path.stem)): path for place, _, inside in places for path in pictures(inside)}
        found = [(image, by_stem.get((place, composed(image.stem)))) for place, inside, _ in places for image in pictures(inside)]
        unreadable |= size_errors((image, mask) for image, mask in found if image in facts and mask is not None and mask in masks)
        classes, counted = classes_in_masks(masks, base.masks), len(masks)
        unopened = len(mask_files) - len(masks) - len(unreadable_masks)
        folders = [folder for place in places for folder in place[1:]]
        unpaired = [note for pair in pairs for note in unpaired_notes(pair)]
        notes = [*unused_split_notes(base.images.parent), *ignored_value_notes(masks), *unpaired]
    notes += [note for folder in folders for note in equal_stem_notes(folder)]
    notes += [*balance_notes(classes, layout.task), *stray_notes(classes)]
    if unopened:
        read = f"{counted} of {counted + unopened} masks were read in {LOOK_S:.0f} s"
        notes.append(f"{read}: `muntin fit` reads all, and names a value that the recipe lacks")
    for file, error in unreadable.items():
        if not is_utf8(str(file)):  # a recipe cannot name it
            raise error
    notes += unreadable_notes(unreadable)
    if unreadable and unopened_images:
        notes.append(f"{count(unopened_images, 'image')} not opened: `muntin fit` opens all, and names those that cannot be read")
    return Survey(
        layout=layout, classes=classes, counted=counted, unopened=unopened, opened=len(images) - unopened_images,
        channels=picture_channels(facts), crop=crop_side(facts, layout.task), unreadable=unreadable, notes=tuple(notes),
    )  # fmt: skip


def unreadable_notes(unreadable: Mapping[PictureFile, DataError]) -> list[str]:
    """A note on each reason for which files cannot be read, with their names."""
    files: dict[str, list[str]] = {}
    for file, error in unreadable.items():
        name, reason = _reason(file, error)
        files.setdefault(reason, []).append(name)
    notes = []
    for reason, names in list(files.items())[:_MAX_REASONS]:
        several = f"{len(names)} files for one reason ({reason}): {list_some(names, _MAX_FILES)}"
        notes.append(f"{several if len(names) > 1 else f'{names[0]} {reason}'}: left out by data.skip in the recipe")
    if more := sum(map(len, list(files.values())[_MAX_REASONS:])):
        notes.append(f"{count(more, 'file')} more cannot be read, for other reasons: see data.skip in the recipe")
    return notes


def stray_notes(classes: MaskClasses) -> list[str]:
    """A note on the values of very few pixels."""
    if not classes.stray:
        return []
    named = list_some([f"value {as_yaml(entry.value)} has {entry.text}" for entry in classes.stray], 3)
    return [
        f"stray? {named}: if that is a mistake, correct the mask and remove the class from the recipe; or set data.ignore to the value in "
        f"place of {'null' if classes.ignore is None else classes.ignore}"
    ]


def balance_notes(classes: MaskClasses, task: Task) -> list[str]:
    """A note on classes of few pixels, or of few pictures beside the most frequent class, and on the settings that help."""
    if not ANSWERS[task].has_classes:
        return []
    shares = {
        entry.name if entry.value is None else as_yaml(entry.value): share
        for entry, share in zip(classes.classes, classes.shares, strict=True)
    }
    bound = FEW_PIXELS if ANSWERS[task].masks else FEW_PICTURES * max(shares.values())
    stray = {as_yaml(entry.value) for entry in classes.stray}
    few = sorted((name for name, share in shares.items() if share < bound and name not in stray), key=shares.__getitem__)
    if not few:
        return []
    named = list_some([f"{name} ({percent(shares[name])})" for name in few], 3)
    if ANSWERS[task].masks:
        return [
            f"few pixels are of {named}: data.rare centres crops on them; if they are still missed, set training.class_weights: auto or "
            "training.loss: dice-cross-entropy, and look at the IoU of each class"
        ]
    return [
        f"few pictures are of {named}, beside {percent(max(shares.values()))} of the most frequent class: set training.class_weights: "
        "auto, or add pictures, and look at the recall of each class"
    ]


def percent(share: float) -> str:
    """A share as a percentage of one digit after the point: 0.005 -> "0.5 %"."""
    return f"{100 * share:.1f} %"


def _reason(file: PictureFile, error: DataError) -> tuple[str, str]:
    """The name of a file, and why it cannot be read, printable and without advice."""
    reason = str(error).removeprefix(str(file)).partition(": ")[0].strip()
    return file.name, _printable(reason)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def run_name(folder: str) -> str:
    """The folder's name with characters that a run's name may not contain replaced by dashes; `mine` if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._") or "mine"


def _recipe_text(survey: Survey, root: Path, *, file: str, absolute: bool) -> str:
    """The recipe as YAML with comments. `absolute`: write absolute paths; otherwise paths relative to `root`."""
    layout, base, ignore = survey.layout, survey.layout.base, survey.classes.ignore
    relative_to = None if absolute else root
    checked = "class names" if layout.answer.has_classes else "degradation"
    lines = [
        f"# A recipe for muntin, written by `muntin init`. Check the {checked} below, then run",
        f"#     muntin fit {shlex.quote(file)}     (with the path to this file; results go to `runs/` in the current folder)",
        "# The progress line shows how long training takes. A key that is left out has its default, which may differ from the value here;",
        "# docs/recipe.md lists all keys and their defaults.",
        "",
        f"name: {_quoted(run_name(root.resolve().name))}  # the run's results go to runs/ under this name",
        f"task: {layout.task}  # segment: a class for every pixel; classify: one class for the picture; restore: a picture",
        "seed: 0  # another number gives another run: the spread between seeds shows which differences matter",
        "",
        "data:",
        f"  source: {'folders' if layout.shards is None else 'shards'}  # your own pictures; `earth` is the built-in demonstration",
        f"  images: {_path(base.images, relative_to)}  # relative paths start at this file's folder",
    ]
    if base.masks is not None:
        lines.append(f"  masks: {_path(base.masks, relative_to)}  # a mask has the stem of its image: a.jpg and a.png")
    if not layout.answer.has_classes:
        lines += restore_lines(layout, "" if base.targets is None else _path(base.targets, relative_to))
    lines += [
        _split_line("validation", "during training", layout.validation, layout, relative_to),
        _split_line("test", "once, at the end", layout.test, layout, relative_to),
    ]
    if layout.validation is None or layout.test is None:
        seed = _split_seed(layout, survey.unreadable)
        lines.append(f"  seed: {seed}  # decides which pictures go into which split; adding pictures moves none of the others")
    if survey.unreadable:
        lines.append("  skip:  # pictures to leave out; these cannot be used")
        lines += [f"    - {_path(Path(str(path)), relative_to)}  # {_reason(path, error)[1]}" for path, error in survey.unreadable.items()]
    if layout.answer.masks:
        lines.append(f"  ignore: {'null' if ignore is None else ignore}  # the mask value that belongs to no class; null: there is none")
    lines += [
        *(_class_lines(survey) if layout.answer.has_classes else []),
        f"  channels: {survey.channels}  # of the images: 3 is colour, 1 grey; up to 16 in .npy files",
        f"  crop: {survey.crop}  # side of the random training squares, pixels; larger has more context and is slower",
    ]
    if layout.answer.masks:
        lines.append("  rare: 0.25  # fraction of the crops centred on a class drawn uniformly: rare classes are seen more often")
    lines += [
        "  augment: light  # random changes to the crops: none, light (flips, zoom, a little colour), standard, strong;",
        f"    # `muntin fit {shlex.quote(file)} --show-crops crops.png` draws them",
        "  augmentation:  # single values in place of the preset's: rotation, hue, mosaic and others, see docs/recipe.md",
        "    flip_horizontal: 0.5  # probability, 0-1",
        "    flip_vertical: 0.0  # 0.5, with rotation: 180, suits pictures taken from above: satellites, microscopes",
    ]
    after = _AFTER_DATA
    if not layout.answer.has_classes:  # which learns by the distance to the clean picture
        lines = [line.replace("flips, zoom, a little colour", "flips, a little colour") for line in lines]
        after = after.replace(_CLASS_LOSS, "").replace(_STEPS_TIME, "")
        after = after.replace(_FIRST_MODEL, _FIRST_RESTORER.replace("WIDE", str(max(48, 4 * survey.channels))))
    return "\n".join(lines) + "\n" + after


def _class_lines(survey: Survey) -> list[str]:
    if survey.layout.answer.one:
        kind = "is a class of the entries .cls" if survey.layout.shards is not None else "has the name of its folder"
        lines = [f"  classes:  # each {kind}; `color` is how charts paint it (red, green, blue)"]
    else:
        lines = ["  classes:  # in order; `value` is the value in the masks, `color` how muntin paints it (red, green, blue): rename them"]
        if survey.unopened:
            lines.append(f"    # from {count(survey.counted, 'mask')}; {survey.unopened} more were not opened: add their classes")
    stray: dict[object, str] = {entry.value: f"  # stray? {entry.text}" for entry in survey.classes.stray}
    for entry in survey.classes.classes:
        value = "" if entry.value is None else f", value: {as_yaml(entry.value)}"
        lines.append(f"    - {{name: {_quoted(entry.name)}{value}, color: {as_yaml(entry.color)}}}{_printable(stray.get(entry.value, ''))}")
    return lines


def _split_line(name: SplitName, scored: str, pair: FolderPair | None, layout: Layout, relative_to: Path | None) -> str:
    if pair is None:
        masks = "" if layout.base.masks is None else ", masks: ..."
        own = f"folders of its own: {{images: ...{masks}{'' if layout.base.targets is None else ', targets: ...'}}}"
        return f"  {name}: {_SHARE}  # {100 * _SHARE:.0f} % of the pictures, not trained on, score the model {scored}; or {own}"
    masks = "" if pair.masks is None else f", masks: {_path(pair.masks, relative_to)}"
    masks += "" if pair.targets is None else f", targets: {_path(pair.targets, relative_to)}"
    return (
        f"  {name}: {{images: {_path(pair.images, relative_to)}{masks}}}  # pictures that are not trained on and score the model {scored}"
    )


def _split_seed(layout: Layout, left_out: Mapping[PictureFile, DataError]) -> int:
    """The first seed that leaves no split empty; for `classify`, one whose splits lack as few classes as possible."""
    stems = {composed(path.stem) for path in left_out}
    by_class = layout.answer.one and layout.shards is None
    keys = [
        key for key, path in training_pictures(layout).items()
        if path not in left_out and (by_class or composed(path.stem) not in stems)  # its mask may be left out
    ]  # fmt: skip
    splits: dict[SplitName, FolderPair | None] = {"validation": layout.validation, "test": layout.test}
    shares = {name: _SHARE for name, pair in splits.items() if pair is None}
    seed = filling_seed(keys, shares, by_class=by_class, balanced=True)
    if seed is None:
        raise DataError(f"{layout.base.images} holds {len(keys)} pictures, too few to split into {1 + len(shares)} parts: add pictures")
    return seed


def _path(path: Path, relative_to: Path | None) -> str:
    return _quoted((path if relative_to is None else path.relative_to(relative_to)).as_posix())


def _quoted(text: str) -> str:
    """`text` as a YAML scalar in double quotes, on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=1 << 30).strip()
