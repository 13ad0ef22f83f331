"""Results of one picture as files: a mask with an overlay and a difference, a restored picture, or a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from muntin.artifact import Signature
from muntin.images import encode_png, overlay, read_image, write_image, write_whole
from muntin.images.truth_masks import read_truth, write_difference
from muntin.runtime.session import Session
from muntin.runtime.tiles import predict, size_note

Result = dict[str, Any]
"""Paths and figures of one picture, as `muntin predict --json` prints them."""


def result_files(target: Path, signature: Signature) -> dict[str, Path]:
    """Return the file of each result of an image. No result has an image's own name, because results may lie beside images."""
    if signature.task == "restore":
        suffix = ".png" if signature.channels in (1, 3, 4) else ".npy"
        return {"image": target.with_name(f"{target.name}.restored{suffix}")}
    return {kind: target.with_name(f"{target.name}.{kind}.png") for kind in ("mask", "overlay", "difference")}


def classify(session: Session, path: Path, max_pixels: int) -> Result:
    """Return the most probable class of one image."""
    image = read_image(path, channels=session.signature.channels, max_pixels=max_pixels, mapped=True)
    scores = predict(session, image)
    weights = np.exp(scores - scores.max())
    best = int(scores.argmax())
    result = {"source": str(path), "class": session.signature.classes[best].name, "probability": float(weights[best] / weights.sum())}
    note = size_note(image.shape[:2], session.signature)
    return result | ({"notes": [f"{path}: {note}"]} if note else {})


def predict_map(
    session: Session, path: Path, target: Path, truth: Path | None, max_pixels: int, tiles: dict[str, Any], *, painted: bool = True
) -> Result:
    """Segment or restore one image and write the result's files: `target` with the endings of `result_files`. `painted`: with overlay."""
    signature, scale = session.signature, session.signature.scale
    image = read_image(path, channels=signature.channels, max_pixels=max_pixels, mapped=True)
    size = [side * scale for side in image.shape[:2]]
    note = size_note(image.shape[:2], signature, tiles["tile"])
    notes = [f"{path}: {note}"] if note else []
    expected = None if truth is None else read_truth(truth, size, signature.classes, max_pixels * scale**2, notes)
    answer = predict(session, image, **tiles)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = result_files(target, signature)
    if signature.task == "restore":
        write_image(files["image"], answer)
        return {"source": str(path), "image": str(files["image"])} | ({"notes": notes} if notes else {})
    result: Result = {"source": str(path), "mask": str(files["mask"])}
    write_whole(files["mask"], encode_png(answer, [entry.color for entry in signature.classes]))
    if painted and image.shape[2] in (1, 3, 4):
        result["overlay"] = str(files["overlay"])
        shown = image if scale == 1 else image.repeat(scale, 0).repeat(scale, 1)
        write_image(files["overlay"], overlay(shown, answer, signature.classes))
    elif painted:
        notes.append(f"{path}: {image.shape[2]} channels cannot be shown: no overlay")
    if expected is not None:
        labels, number_names = expected
        result |= {"difference": str(files["difference"]), "agreement": write_difference(files["difference"], answer, labels)}
        if number_names:
            result["truth"] = number_names
    result["shares"] = {entry.name: float((answer == k).sum() / answer.size) for k, entry in enumerate(signature.classes)}
    if notes:
        result["notes"] = notes
    return result
