"""One picture: opened, computed, and its answer written as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.images import PictureSink, open_source
from muntin.images.opening import check_pixels
from muntin.runtime.session import Session
from muntin.runtime.tiles import predict, size_note
from muntin.tasks.answers import ANSWERING
from muntin.tasks.base import Picture, Result

Range = tuple[float, float]
"""The values that are read as 0 and 255."""


def predict_picture(
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
    """Compute one image and write the files of its answer: `target` with the endings of `Answering.files`. `painted`: with overlay.

    `tiles`: arguments of `predict`. A raster is read and written by window.
    """
    signature = session.signature
    image = open_source(path, signature.channels, max_pixels=max_pixels, value_range=value_range)
    if signature.answer.one:
        check_pixels(path, (image.shape[1], image.shape[0]), max_pixels)  # of a raster, its middle is read at once
    note = size_note(image.shape[:2], signature, tiles.get("tile"))

    def compute(into: PictureSink | None) -> Any:
        return predict(session, image, **tiles) if into is None else predict(session, image, **tiles, into=into)

    picture = Picture(
        path=path, image=image, target=target, signature=signature, max_pixels=max_pixels, truth=truth, scaled=value_range is not None,
        painted=painted, notes=[f"{path}: {note}"] if note else [],
    )  # fmt: skip
    result = ANSWERING[signature.task].write(picture, compute)
    return result | ({"notes": picture.notes} if picture.notes else {})
