"""Examine the classes in shards, for `muntin init`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from muntin.data.inspection import MaskClasses, class_shares, classes_in_masks, mask_facts, pixel_counts, read_some
from muntin.data.shards.source import ShardContent, class_numbers, classes_of_labels, label_number, read_classes
from muntin.errors import DataError
from muntin.images import IGNORED, read_mask
from muntin.images.opening import PictureFile
from muntin.tasks.classes import ClassSpec, MaskMapping, distinct_colors


def shard_classes(content: ShardContent, place: Path) -> tuple[MaskClasses, int, int, dict[PictureFile, DataError]]:
    """The classes in shards, from `classes.json` if there is one; the number of masks (or classes) counted, of masks left unopened, and
    the masks that cannot be read, with the reason."""
    specs = read_classes(place.parent if "*" in place.name else place)
    if not content.masks:
        specs = specs or classes_of_labels(content.labels.values())
        numbers = class_numbers(specs)
        labels = Counter(label_number(text, numbers) for text in content.labels.values())
        shares = tuple(labels[number] / len(content.labels) for number in range(len(specs)))
        return MaskClasses(classes=_colored(specs), ignore=None, shares=shares), len(content.labels), 0, {}
    files = list[PictureFile](content.masks.values())
    specs = [spec if spec.value is not None else spec.model_copy(update={"value": index}) for index, spec in enumerate(specs)]
    mapping = MaskMapping(specs, IGNORED) if specs else None
    if mapping is None:
        masks, unreadable = read_some(files, mask_facts)
        return classes_in_masks(masks, place), len(masks), len(files) - len(masks) - len(unreadable), unreadable
    counts, unreadable = read_some(files, lambda file: pixel_counts([mapping(read_mask(file, colors=mapping.colors), file)]))
    pixels: Counter[int] = Counter()
    for each in counts.values():
        pixels.update(each)
    classes = MaskClasses(classes=_colored(specs), ignore=IGNORED, shares=class_shares(pixels, range(len(specs))))
    return classes, len(counts), len(files) - len(counts) - len(unreadable), unreadable


def _colored(specs: Sequence[ClassSpec]) -> tuple[ClassSpec, ...]:
    """The classes, each with a colour."""
    colors = distinct_colors(len(specs))
    return tuple(spec if spec.color else spec.model_copy(update={"color": color}) for spec, color in zip(specs, colors, strict=True))
