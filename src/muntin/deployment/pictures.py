"""Pictures of a deployed model's predictions: overlays, differences, examples.

Axes: H W map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from muntin.artifact.classes import ClassInfo
from muntin.data.batches import BatchMaker
from muntin.data.restoration.degradation import enlarged
from muntin.data.source import Sample
from muntin.images import IGNORED, colorize, difference, encode_png, overlay, to_rgb, write_image, write_whole
from muntin.images.legend import PAPER, LegendEntry, with_legend
from muntin.images.opening import UInt8
from muntin.runtime.session import Labels
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.text import plain
from muntin.training.restoration.evaluation import psnr

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


def example_windows(samples: Sequence[Sample], *, side: int, count: int) -> list[tuple[int, int, int]]:
    """Return (sample, top, left) of the `count` separate windows with the most varied truth, chosen without any prediction."""
    windows: list[tuple[float, int, int, int]] = []
    for index in range(len(samples)):
        labels = samples[index].labels
        height, width = labels.shape
        for top in range(0, max(1, height - side + 1), side):
            for left in range(0, max(1, width - side + 1), side):
                shares = np.bincount(labels[top : top + side, left : left + side].ravel(), minlength=256)[:IGNORED]
                total = shares.sum()
                if total:
                    p = shares[shares > 0] / total
                    windows.append((float(-(p * np.log(p)).sum()), index, top, left))
    windows.sort(key=lambda entry: (-entry[0], *entry[1:]))
    return [(index, top, left) for _, index, top, left in windows[:count]]


def write_examples(
    directory: Path, session: Predictor, samples: Sequence[Sample], classes: Sequence[ClassInfo], *, side: int, tile: int, count: int = 5
) -> list[dict[str, str]]:
    """Write picture, truth, prediction (in the tiles of the score) and difference of windows of a split to `directory/pictures`."""
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (index, top, left) in enumerate(example_windows(samples, side=side, count=count), 1):
        sample = samples[index]
        image, truth = (np.ascontiguousarray(a[top : top + side, left : left + side]) for a in (sample.image, sample.labels))
        labels = predict(session, image, tile=allowed_tile(session.signature, tile))
        name = f"{plain(sample.name)}, {_place(top, left, truth)}"
        examples.append({"name": name} | _write_views(folder, f"{number}", image, truth, labels, classes))
    return examples


def _place(top: int, left: int, part: NDArray[Any]) -> str:
    return f"rows {top}-{top + part.shape[0]}, columns {left}-{left + part.shape[1]}"


def _write_views(
    folder: Path, prefix: str, image: UInt8, truth: UInt8, labels: NDArray[Any], classes: Sequence[ClassInfo]
) -> dict[str, str]:
    """Write a picture, its truth, a prediction and their difference. Returns their paths from the folder above."""
    views = {
        "image": to_rgb(image), "truth": colorize(truth, classes), "prediction": colorize(labels, classes),
        "difference": difference(labels, truth),
    }  # fmt: skip
    for kind, view in views.items():
        write_image(folder / f"{prefix}-{kind}.png", view)
    return {kind: f"{folder.name}/{prefix}-{kind}.png" for kind in views}


def worst_windows(
    samples: Sequence[Sample], labels: Sequence[Labels], *, classes: int, side: int, count: int
) -> list[tuple[float, int, int, int]]:
    """Return (mean IoU, sample, top, left) of the `count` pictures with the lowest mean IoU over their classes, the lowest first.

    The window, of `side` pixels, is the one with the most wrong pixels. Pictures without a wrong pixel are left out. Reads every truth
    once.
    """
    found: list[tuple[float, int, int, int]] = []
    for index, (sample, answer) in enumerate(zip(samples, labels, strict=True)):
        both, either = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        worst = (0, 0, 0)
        height, width = sample.labels.shape
        for top in range(0, height, side):
            for left in range(0, width, side):
                truth, guess = (np.asarray(part[top : top + side, left : left + side]) for part in (sample.labels, answer))
                counted = truth != IGNORED
                truth, guess = truth[counted].astype(np.int64), guess[counted].astype(np.int64)
                right = np.bincount(truth[truth == guess], minlength=classes)
                both += right
                either += np.bincount(truth, minlength=classes) + np.bincount(guess, minlength=classes) - right
                worst = max(worst, (int((truth != guess).sum()), -top, -left))
        if worst[0]:
            present = either > 0
            found.append((float((both[present] / either[present]).mean()), index, -worst[1], -worst[2]))
    return sorted(found)[:count]


def write_worst(
    directory: Path, samples: Sequence[Sample], labels: Sequence[Labels], classes: Sequence[ClassInfo], *, side: int, count: int = 4
) -> list[dict[str, str]]:
    """Write the views of `write_examples` of the worst pictures to `directory/pictures`. `labels`: of each sample."""
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (iou, index, top, left) in enumerate(worst_windows(samples, labels, classes=len(classes), side=side, count=count), 1):
        sample, window = samples[index], (slice(top, top + side), slice(left, left + side))
        image, truth, guess = (np.ascontiguousarray(part[window]) for part in (sample.image, sample.labels, labels[index]))
        name = f"{plain(sample.name)}: mean IoU {iou:.3f}; {_place(top, left, truth)}"
        examples.append({"name": name} | _write_views(folder, f"worst-{number}", image, truth, guess, classes))
    return examples


def write_restored_examples(
    directory: Path, samples: Sequence[Sample], restored: Sequence[UInt8], *, side: int, count: int = 5
) -> list[dict[str, str]]:
    """Write input (enlarged bicubically), restored and clean picture, and four times the error, to `directory/pictures`.

    Of each of the first pictures the window of `side` pixels with the most varied clean pixels. `restored`: whole, of each sample.
    """
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for index in range(min(count, len(samples))):
        sample = samples[index]
        clean, scale = sample.clean, sample.clean.shape[0] // sample.image.shape[0]
        places = [(top, left) for top in range(0, max(1, clean.shape[0] - side + 1), side)
                  for left in range(0, max(1, clean.shape[1] - side + 1), side)]  # fmt: skip
        top, left = max(places, key=lambda place: float(clean[place[0] : place[0] + side, place[1] : place[1] + side].std()))
        window = np.s_[top : top + side, left : left + side]
        before, after, truth = (picture[window] for picture in (enlarged(sample.image[:, :], scale), restored[index], clean))
        error = np.abs(after.astype(np.int16) - truth)
        views = {"image": before, "prediction": after, "truth": truth, "difference": np.minimum(255, 4 * error).astype(np.uint8)}
        place = f"{plain(sample.name)}, rows {top}-{top + truth.shape[0]}, columns {left}-{left + truth.shape[1]}"
        example = {"name": f"{place}: PSNR {psnr(before, truth):.2f} dB before, {psnr(after, truth):.2f} dB after"}
        for kind, view in views.items():
            write_image(folder / f"{index + 1}-{kind}.png", np.ascontiguousarray(to_rgb(view)))
            example[kind] = f"pictures/{index + 1}-{kind}.png"
        examples.append(example)
    return examples


def write_class_examples(
    directory: Path,
    session: Predictor,
    samples: Sequence[Sample],
    labels: Sequence[Labels],
    classes: Sequence[ClassInfo],
    *,
    side: int,
    count: int = 12,
) -> list[dict[str, str]]:
    """Write copies of a classifier's wrong pictures, the largest loss first, of at most `side` pixels, to `directory/pictures`.

    Where none is wrong, those are written whose two highest scores are nearest to each other. `labels`: of each sample. Costs a prediction
    of the wrong pictures, or of the split.
    """

    def margin(index: int) -> float:
        scores_K = np.sort(predict(session, samples[index].image))
        return float(scores_K[-1] - scores_K[-2:][0])

    def gain(index: int) -> float:
        scores_K = predict(session, samples[index].image)
        return float(scores_K[int(np.asarray(samples[index].target))] - np.logaddexp.reduce(scores_K))

    numbers = [int(answer[0]) for answer in labels]
    wrong = [index for index, number in enumerate(numbers) if number != samples[index].target]
    chosen = sorted(wrong, key=gain) if wrong else sorted(range(len(samples)), key=margin)
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, index in enumerate(chosen[:count], 1):
        sample = samples[index]
        image = Image.fromarray(to_rgb(sample.corner))
        image.thumbnail((side, side))
        write_image(folder / f"{number}-image.png", np.asarray(image))
        truth, answer = classes[int(np.asarray(sample.target))].name, classes[numbers[index]].name
        examples.append({"name": f"{plain(sample.name)}: true {truth}, predicted {answer}", "image": f"pictures/{number}-image.png"})
    return examples


def write_crops(file: Path, crops: BatchMaker, classes: Sequence[ClassInfo], *, task: str) -> int:
    """Write the first training crops as one picture, as the model will get them, and return their number.

    segment: each crop beside itself with its mask laid over, with a legend. classify: each crop above its class, or its shares of classes.
    restore: each input, enlarged to the size of the clean picture, beside it.
    """
    images_BCHW, target = crops.batch(0, slice(0, CROPS_SHOWN))
    tiles = []
    for image_CHW, truth in zip(images_BCHW, target.numpy(), strict=True):
        image = np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy())
        if task == "restore":
            clean = np.ascontiguousarray(truth.transpose(1, 2, 0))
            image = np.concatenate([enlarged(image, clean.shape[0] // image.shape[0]), clean], axis=1)
        image = to_rgb(image)
        if task == "segment":
            image = np.concatenate([image, overlay(image, truth, classes)], axis=1)
        shown = Image.fromarray(image).resize((CROP_SIDE * image.shape[1] // image.shape[0], CROP_SIDE), Image.Resampling.BILINEAR)
        tiles.append(
            np.asarray(shown) if task != "classify" else with_legend(np.asarray(shown), _caption(truth, classes), size=14)[: CROP_SIDE + 28]
        )
    across = CROPS_ACROSS if task != "classify" else 2 * CROPS_ACROSS
    height, width = (max(tile.shape[axis] for tile in tiles) + CROP_GAP for axis in (0, 1))
    sheet = np.full((-(-len(tiles) // across) * height, min(across, len(tiles)) * width, 3), PAPER, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // across * height, number % across * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    if task == "segment":
        sheet = with_legend(sheet, [(entry.name, entry.color) for entry in classes], size=18)
    write_image(file, sheet)
    return len(tiles)


def _caption(truth: NDArray[Any], classes: Sequence[ClassInfo]) -> list[LegendEntry]:
    """The class of a picture, or its shares of classes, the largest first."""
    if not truth.ndim:
        return [(classes[int(truth)].name, classes[int(truth)].color)]
    order = sorted(np.flatnonzero(truth).tolist(), key=lambda k: -truth[k])
    return [(f"{classes[k].name} {truth[k]:.0%}", classes[k].color) for k in order]


def write_picture(
    directory: Path, session: Predictor, image: UInt8, truth: UInt8, borders: Sequence[Border], classes: Sequence[ClassInfo], *, tile: int
) -> None:
    """Write the whole picture in blended tiles: `mask.png`, `overlay.png` with the borders of the splits, `difference.png`."""
    labels = predict(session, image, tile=allowed_tile(session.signature, tile))
    write_whole(directory / "mask.png", encode_png(labels, [entry.color for entry in classes]))
    write_image(directory / "overlay.png", draw_borders(overlay(image, labels, classes), borders))
    write_image(directory / "difference.png", draw_borders(difference(labels, truth), borders))
