"""Pictures of a deployed model's predictions: overlays, differences, examples.

Axes: H W map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muntin.artifact.classes import ClassInfo
from muntin.data.restoration.degradation import enlarged
from muntin.data.source import Sample
from muntin.images import IGNORED, colorize, difference, encode_png, overlay, to_rgb, write_image, write_whole
from muntin.images.opening import UInt8
from muntin.runtime.session import Labels
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.text import plain
from muntin.training.restoration.evaluation import psnr

Border = tuple[int, int, str]


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
        views = {
            "image": to_rgb(image),
            "truth": colorize(truth, classes),
            "prediction": colorize(labels, classes),
            "difference": difference(labels, truth),
        }
        example = {"name": f"{plain(sample.name)}, rows {top}-{top + truth.shape[0]}, columns {left}-{left + truth.shape[1]}"}
        for kind, view in views.items():
            write_image(folder / f"{number}-{kind}.png", view)
            example[kind] = f"pictures/{number}-{kind}.png"
        examples.append(example)
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
    """Write copies of a classifier's wrong pictures, of at most `side` pixels, to `directory/pictures`.

    Where none is wrong, those are written whose two highest scores are nearest to each other. `labels`: of each sample. Costs a prediction
    of the split in that case.
    """

    def margin(index: int) -> float:
        scores_K = np.sort(predict(session, samples[index].image))
        return float(scores_K[-1] - scores_K[-2:][0])

    numbers = [int(answer[0]) for answer in labels]
    chosen = [index for index, number in enumerate(numbers) if number != samples[index].target] or sorted(range(len(samples)), key=margin)
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


def write_picture(
    directory: Path, session: Predictor, image: UInt8, truth: UInt8, borders: Sequence[Border], classes: Sequence[ClassInfo], *, tile: int
) -> None:
    """Write the whole picture in blended tiles: `mask.png`, `overlay.png` with the borders of the splits, `difference.png`."""
    labels = predict(session, image, tile=allowed_tile(session.signature, tile))
    write_whole(directory / "mask.png", encode_png(labels, [entry.color for entry in classes]))
    write_image(directory / "overlay.png", draw_borders(overlay(image, labels, classes), borders))
    write_image(directory / "difference.png", draw_borders(difference(labels, truth), borders))
