"""Results of one picture as files: a mask with an overlay and a difference, a restored picture, or a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.errors import DataError, DependencyError
from muntin.images import IGNORED, PictureSink, encode_png, open_sink, open_source, overlay, write_image, write_whole
from muntin.images.legend import present_classes, with_legend
from muntin.images.opening import check_pixels
from muntin.images.rasters import WINDOWED_PIXELS, OpenRasters, is_raster, mask_raster
from muntin.images.sources import PictureSource, raster_of
from muntin.images.truth_masks import read_truth, write_difference
from muntin.runtime.session import Labels, Session
from muntin.runtime.tiles import predict, size_note

Result = dict[str, Any]
"""Paths and figures of one picture, as `muntin predict --json` prints them."""
Range = tuple[float, float]
"""The values that are read as 0 and 255."""
MOST_SIDE = 65_500
"""Longest side of an overlay, a JPEG, in pixels (libjpeg)."""


def result_files(path: Path, target: Path, signature: Signature, *, scaled: bool = False) -> dict[str, Path]:
    """Return the file of each result of an image. No result has an image's own name, because results may lie beside images.

    Of a raster, the mask or the restored picture is a GeoTIFF. `scaled`: the image is read with a range.
    """
    try:
        raster = is_raster(path)
    except (DataError, DependencyError):  # reported when it is computed
        raster = False
    if signature.task == "restore":
        plain = ".npy" if signature.channels not in (1, 3, 4) or (scaled and path.suffix.lower() == ".npy") else ".png"
        return {"image": target.with_name(f"{target.name}.restored{'.tif' if raster else plain}")}
    kinds = {"mask": ".tif" if raster else ".png", "overlay": ".jpg", "difference": ".png"}
    return {kind: target.with_name(f"{target.name}.{kind}{suffix}") for kind, suffix in kinds.items()}


def classify(session: Session, path: Path, max_pixels: int, value_range: Range | None = None) -> Result:
    """Return the most probable class of one image."""
    image = open_source(path, session.signature.channels, max_pixels=max_pixels, value_range=value_range)
    check_pixels(path, (image.shape[1], image.shape[0]), max_pixels)  # of a raster, its middle is read at once
    scores = predict(session, image)
    weights = np.exp(scores - scores.max())
    best = int(scores.argmax())
    result = {"source": str(path), "class": session.signature.classes[best].name, "probability": float(weights[best] / weights.sum())}
    note = size_note(image.shape[:2], session.signature)
    return result | ({"notes": [f"{path}: {note}"]} if note else {})


def predict_map(
    session: Session,
    path: Path,
    target: Path,
    truth: Path | None,
    max_pixels: int,
    tiles: dict[str, Any],
    value_range: Range | None = None,
    *,
    painted: bool = True,
) -> Result:
    """Segment or restore one image and write the result's files: `target` with the endings of `result_files`. `painted`: with overlay.

    A raster is read and written by window. A difference, and an overlay of at most `WINDOWED_PIXELS` pixels, are made in memory.
    """
    signature, scale = session.signature, session.signature.scale
    image = open_source(path, signature.channels, max_pixels=max_pixels, value_range=value_range)
    size = [side * scale for side in image.shape[:2]]
    note = size_note(image.shape[:2], signature, tiles["tile"])
    notes = [f"{path}: {note}"] if note else []
    expected = None if truth is None else read_truth(truth, size, signature.classes, max_pixels * scale**2, notes)
    files = result_files(path, target, signature, scaled=value_range is not None)
    target.parent.mkdir(parents=True, exist_ok=True)
    raster = raster_of(image) is not None
    if signature.task == "restore":
        if raster:
            with open_sink(files["image"], like=image) as sink:
                predict(session, image, **tiles, into=sink)
        else:
            write_image(files["image"], predict(session, image, **tiles))
        return {"source": str(path), "image": str(files["image"])} | ({"notes": notes} if notes else {})
    result: Result = {"source": str(path), "mask": str(files["mask"])}
    answer: Labels | None = None
    if raster:
        with open_sink(files["mask"], like=image, classes=signature.classes) as sink:
            counting = _CountingSink(sink, signature.classes)
            predict(session, image, **tiles, into=counting)
        counts = counting.counts
        if expected is not None or (painted and size[0] * size[1] <= WINDOWED_PIXELS):
            answer = mask_raster(files["mask"], OpenRasters(), None)[:, :]
    else:
        answer = predict(session, image, **tiles)
        counts = _class_counts(answer, len(signature.classes))
        colors = [entry.color for entry in signature.classes] if answer.dtype == np.uint8 else []
        write_whole(files["mask"], encode_png(answer, colors))
    if painted and (note := _write_overlay(files["overlay"], image, answer, signature)):
        notes.append(f"{path}: {note}")
    elif painted:
        result["overlay"] = str(files["overlay"])
    if expected is not None and answer is not None:
        labels, number_names = expected
        result |= {"difference": str(files["difference"]), "agreement": write_difference(files["difference"], answer, labels)}
        if number_names:
            result["truth"] = number_names
    total = max(1, int(counts.sum()))
    result["shares"] = {entry.name: count / total for entry, count in zip(signature.classes, counts.tolist(), strict=True)}
    if notes:
        result["notes"] = notes
    return result


def _write_overlay(file: Path, image: PictureSource, labels: Labels | None, signature: Signature) -> str:
    """Write the overlay of a picture with a legend below it; or return the reason why there is none."""
    height, width, channels = image.shape
    scale = signature.scale
    if channels not in (1, 3, 4):
        return f"{channels} channels cannot be shown: no overlay"
    raster = raster_of(image)
    if raster is not None and raster.masked and len(signature.classes) > IGNORED:
        return "pixels without data have no colour among so many classes: no overlay"
    in_memory = raster is None or height * width * scale**2 <= WINDOWED_PIXELS
    if labels is None or not in_memory or scale * max(height, width) > MOST_SIDE:
        return f"{width * scale}×{height * scale} pixels are too many for an overlay: lay the mask, which has colours, over the raster"
    pixels = image[:, :]
    shown = pixels if scale == 1 else pixels.repeat(scale, 0).repeat(scale, 1)
    painted = with_legend(overlay(shown, labels, signature.classes), present_classes(labels, signature.classes))
    write_image(file, painted[:MOST_SIDE])
    return ""


def _class_counts(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Number of pixels of each class. Further labels do not count."""
    return np.array([np.count_nonzero(labels == k) for k in range(classes)], np.int64)


class _CountingSink:
    """A sink that also counts the pixels of each class."""

    def __init__(self, sink: PictureSink, classes: Sequence[ClassInfo]) -> None:
        self._sink = sink
        self.counts = np.zeros(len(classes), np.int64)

    def begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._sink.begin(shape, dtype)

    def write(self, top: int, band: NDArray[Any], empty_HW: NDArray[np.bool_] | None = None) -> None:
        self._sink.write(top, band, empty_HW)  # marks pixels without data
        self.counts += _class_counts(band, len(self.counts))
