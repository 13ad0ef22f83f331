"""The mask that `muntin predict --truth` compares a prediction with.

Axes: H W map, C colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images.decoding import read_mask
from muntin.images.painting import IGNORED, difference
from muntin.images.writing import write_image


def read_truth(
    path: Path, size: Sequence[int], classes: Sequence[ClassInfo], max_pixels: int, notes: list[str]
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Return the mask as class numbers (H, W), and the class name of each number that the file holds; empty for a mask of colours.

    `size` is the (H, W) of the prediction. Adds to `notes`. Raises DataError for another size or values that are no class.
    """
    if len(classes) > IGNORED:
        raise DataError(
            f"{path}: a mask, in which {IGNORED} is ignored, compares at most {IGNORED} classes, and the model has {len(classes)}"
        )
    mask = read_mask(path, max_pixels=max_pixels)
    allowed = f"0 to {len(classes) - 1}, and {IGNORED} for what is ignored"
    has_numbers = mask.ndim == 2
    if not has_numbers:
        mask = _class_numbers(path, mask, classes, allowed)
    if mask.shape != tuple(size):
        raise DataError(
            f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]} and the answer {size[1]}x{size[0]}; give the mask of this image"
        )
    values = np.unique(mask)
    if values.tolist() == [IGNORED]:
        raise DataError(f"{path}: every pixel is {IGNORED}, which counts as ignored, and none is compared: allowed are {allowed}")
    if values.tolist() == [0, IGNORED] and len(classes) == 2:
        notes.append(f"{path}: {IGNORED} counts as ignored, so class 0 alone is compared; if it means {classes[1].name}, write 1 there")
    wrong = np.setdiff1d(values, [*range(len(classes)), IGNORED])
    if wrong.size:
        raise DataError(f"{path}: the mask holds the value {wrong[0]}; allowed are {allowed} (a recipe's `value`s are not in an artefact)")
    return mask.astype(np.uint8), {int(value): classes[value].name for value in values if has_numbers and value != IGNORED}


def _class_numbers(path: Path, mask_HWC: NDArray[np.uint8], classes: Sequence[ClassInfo], allowed: str) -> NDArray[np.uint8]:
    """Return the class number of each pixel by the colours of the artefact's classes. Raises DataError for any other colour."""
    numbers = {entry.color: number for number, entry in enumerate(classes)}
    colors, places = np.unique(mask_HWC.reshape(-1, 3), axis=0, return_inverse=True)
    mask_colors = [tuple(color) for color in colors.tolist()]
    unknown = next((color for color in mask_colors if color not in numbers), None)
    if unknown is not None or len(numbers) < len(classes):
        painted = ", ".join(f"{entry.name} {list(entry.color)}" for entry in classes[:4]) + (", ..." if len(classes) > 4 else "")
        holds = "two classes of the artefact have one colour" if unknown is None else f"no class of the artefact has its {list(unknown)}"
        raise DataError(
            f"{path}: the mask is a colour picture, and {holds} ({painted}; a recipe's `value`s are not in it): give it in these colours, "
            f"or as class numbers, {allowed}"
        )
    return np.array([numbers[color] for color in mask_colors], np.uint8)[places.reshape(mask_HWC.shape[:2])]


def write_difference(path: Path, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Write the difference picture and return the share of pixels with a class whose labels agree."""
    write_image(path, difference(labels, truth))
    return float((labels == truth)[truth != IGNORED].mean())
