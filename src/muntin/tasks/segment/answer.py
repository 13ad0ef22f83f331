"""A mask: the class of every pixel, with an overlay and a difference from a true mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.images import IGNORED, PictureSink, encode_png, open_sink, overlay, write_image, write_whole
from muntin.images.legend import present_classes, with_legend
from muntin.images.rasters import WINDOWED_PIXELS, OpenRasters, mask_raster, raster_at
from muntin.images.sources import PictureSource, raster_of
from muntin.images.truth_masks import read_truth, write_difference
from muntin.tasks.base import Answering, ComputePicture, Floats, Picture, PictureFeature, Result
from muntin.tasks.class_shares import class_shares, share_features
from muntin.tasks.segment.folders import MaskFolders

MOST_SIDE = 65_500
"""Longest side of an overlay, a JPEG, in pixels (libjpeg)."""


class MaskAnswering(Answering):
    """A mask in colours, its overlay, and the share of each class. A raster's mask is a GeoTIFF."""

    folders: ClassVar = MaskFolders()
    videos: ClassVar = {"mask": "mask.mkv", "overlay": "overlay.mp4"}
    routes = ("mask", "overlay", "labels", "json")
    useless = ()
    words = "a mask"

    def files(self, path: Path, target: Path, signature: Signature, *, scaled: bool) -> dict[str, Path]:
        kinds = {"mask": ".tif" if raster_at(path) else ".png", "overlay": ".jpg", "difference": ".png"}
        return {kind: target.with_name(f"{target.name}.{kind}{suffix}") for kind, suffix in kinds.items()}

    def write(self, picture: Picture, compute: ComputePicture) -> Result:
        """A raster is read and written by window. A difference, and an overlay of at most `WINDOWED_PIXELS`, are made in memory."""
        signature, image, scale = picture.signature, picture.image, picture.signature.scale
        height, width = (side * scale for side in image.shape[:2])
        notes, truth, pixels = picture.notes, picture.truth, picture.max_pixels * scale**2
        expected = None if truth is None else read_truth(truth, [height, width], signature.classes, pixels, notes)
        files = self.files(picture.path, picture.target, signature, scaled=picture.scaled)
        picture.target.parent.mkdir(parents=True, exist_ok=True)
        result: Result = {"source": str(picture.path), "mask": str(files["mask"])}
        answer: NDArray[Any] | None = None
        if raster_of(image) is not None:
            with open_sink(files["mask"], like=image, classes=signature.classes) as sink:
                counting = _CountingSink(sink, signature.classes)
                compute(counting)
            counts = counting.counts
            if expected is not None or (picture.painted and height * width <= WINDOWED_PIXELS):
                answer = mask_raster(files["mask"], OpenRasters(), None)[:, :]
        else:
            answer = compute(None)
            counts = _class_counts(answer, len(signature.classes))
            colors = [entry.color for entry in signature.classes] if answer.dtype == np.uint8 else []
            write_whole(files["mask"], encode_png(answer, colors))
        if picture.painted and (note := _write_overlay(files["overlay"], image, answer, signature)):
            notes.append(f"{picture.path}: {note}")
        elif picture.painted:
            result["overlay"] = str(files["overlay"])
        if expected is not None and answer is not None:
            labels, number_names = expected
            result |= {"difference": str(files["difference"]), "agreement": write_difference(files["difference"], answer, labels)}
            if number_names:
                result["truth"] = number_names
        total = max(1, int(counts.sum()))
        result["shares"] = {entry.name: count / total for entry, count in zip(signature.classes, counts.tolist(), strict=True)}
        return result

    def encode(self, image: NDArray[np.uint8], answer: NDArray[Any], route: str, signature: Signature) -> bytes | Result:
        if route == "json":
            counts = np.bincount(answer.ravel(), minlength=len(signature.classes)).tolist()
            shares = [{"name": entry.name, "share": count / answer.size} for entry, count in zip(signature.classes, counts, strict=True)]
            return {"height": answer.shape[0], "width": answer.shape[1], "classes": shares}
        if route == "overlay":
            return encode_png(overlay(_enlarged(image, signature.scale), answer, signature.classes))
        colors = [entry.color for entry in signature.classes] if route == "mask" and answer.dtype == np.uint8 else []
        return encode_png(answer, colors)

    def feature_list(self, signature: Signature) -> list[PictureFeature]:
        borders = PictureFeature(name="borders between classes", more="more frequent", less="rarer", unit="share")
        return [*share_features(signature, least=1.0), borders]

    def features(self, scores: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], signature: Signature) -> Floats:
        labels = scores.argmax(0)
        return np.append(class_shares(labels, len(signature.classes)), _borders(labels))

    def frame(self, pixels_HWC: NDArray[np.uint8], answer: NDArray[Any], signature: Signature, *, painted: bool) -> dict[str, NDArray[Any]]:
        pictures = {"mask": answer}
        return pictures | {"overlay": overlay(_enlarged(pixels_HWC, signature.scale), answer, signature.classes)} if painted else pictures


def _enlarged(pixels_HWC: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return pixels_HWC if scale == 1 else pixels_HWC.repeat(scale, 0).repeat(scale, 1)


def _write_overlay(file: Path, image: PictureSource, labels: NDArray[Any] | None, signature: Signature) -> str:
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
    painted = overlay(_enlarged(image[:, :], scale), labels, signature.classes)
    write_image(file, with_legend(painted, present_classes(labels, signature.classes))[:MOST_SIDE])
    return ""


def _class_counts(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Number of pixels of each class. Further labels do not count."""
    return np.array([np.count_nonzero(labels == k) for k in range(classes)], np.int64)


def _borders(labels_HW: NDArray[np.intp]) -> float:
    """Return the share of neighbouring pixels of different classes."""
    changes = [np.diff(labels_HW, axis=axis) != 0 for axis in (0, 1)]
    return float(np.mean([part.mean() for part in changes if part.size] or [0.0]))


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
