"""Pictures of training crops, and of the demonstration's whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muntin.artifact.answers import ANSWERS, Task
from muntin.artifact.classes import ClassInfo
from muntin.data.batches import BatchMaker
from muntin.images import difference, encode_png, overlay, write_image, write_whole
from muntin.images.legend import PAPER, with_legend
from muntin.images.opening import UInt8
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.tasks.learning import LEARNING

Border = tuple[int, int, str]
CROPS_SHOWN, CROPS_ACROSS = 12, 3
"""Crops that `write_crops` shows, and those in a row; classify has twice as many."""
CROP_SIDE, CROP_GAP = 256, 12
"""Side of a crop in that picture, and the space between crops, pixels."""


def draw_borders(picture_HWC: UInt8, borders: Sequence[Border]) -> UInt8:
    """Return a copy with the borders of the splits as lines and their names along the top."""
    image = Image.fromarray(picture_HWC.copy())
    pen = ImageDraw.Draw(image)
    height, width = picture_HWC.shape[:2]
    line = max(1, width // 900)
    font = ImageFont.load_default(size=max(10, height // 45))
    for start, end, split in borders:
        if split == "left out":
            pen.rectangle((start, 0, end - 1, height), fill=(20, 20, 20))
            continue
        if split != "train":
            pen.rectangle((start, 0, end - 1, height - 1), outline=(255, 255, 255), width=2 * line)
        pen.text((start + 6 * line, 6 * line), split, fill=(255, 255, 255), font=font, stroke_width=max(1, line), stroke_fill=(0, 0, 0))
    return np.asarray(image)


def write_crops(file: Path, crops: BatchMaker, classes: Sequence[ClassInfo], *, task: Task) -> int:
    """Write the first training crops with their targets as one picture, as the model will get them, and return their number."""
    images_BCHW, target = crops.batch(0, slice(0, CROPS_SHOWN))
    facts, learning, tiles = ANSWERS[task], LEARNING[task], []
    for image_CHW, truth in zip(images_BCHW, target.numpy(), strict=True):
        image = learning.shown(np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()), truth, classes)
        shown = np.asarray(
            Image.fromarray(image).resize((CROP_SIDE * image.shape[1] // image.shape[0], CROP_SIDE), Image.Resampling.BILINEAR)
        )
        caption = learning.caption(truth, classes)
        tiles.append(with_legend(shown, caption, size=14)[: CROP_SIDE + 28] if caption else shown)
    across = 2 * CROPS_ACROSS if facts.one else CROPS_ACROSS
    height, width = (max(tile.shape[axis] for tile in tiles) + CROP_GAP for axis in (0, 1))
    sheet = np.full((-(-len(tiles) // across) * height, min(across, len(tiles)) * width, 3), PAPER, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // across * height, number % across * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    if facts.masks:
        sheet = with_legend(sheet, [(entry.name, entry.color) for entry in classes], size=18)
    write_image(file, sheet)
    return len(tiles)


def write_picture(
    directory: Path, session: Predictor, image: UInt8, truth: UInt8, borders: Sequence[Border], classes: Sequence[ClassInfo], *, tile: int
) -> None:
    """Write the whole picture in blended tiles: `mask.png`, `overlay.png` with the borders of the splits, `difference.png`."""
    labels = predict(session, image, tile=allowed_tile(session.signature, tile))
    write_whole(directory / "mask.png", encode_png(labels, [entry.color for entry in classes]))
    write_image(directory / "overlay.png", draw_borders(overlay(image, labels, classes), borders))
    write_image(directory / "difference.png", draw_borders(difference(labels, truth), borders))
