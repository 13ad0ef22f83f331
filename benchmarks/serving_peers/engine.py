"""The computation of a batch in every server here, and in the bare engine: one artefact, one session, labels or scores.

The engine is muntin's own in all of them, with the same number of threads and the same cache of compiled models, each number of rows up to
the largest batch compiled and computed once before a server says that it is ready.

Axes: B images, H and W rows and columns, C channels, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin


class Engine:
    """uint8 (B, side, side, C) -> uint8 labels (B, side, side) of a segmentation, float32 scores (B, K) of a classification."""

    def __init__(self, artifact: str | Path, *, side: int, threads: int, max_rows: int) -> None:
        self.session = muntin.load(artifact, threads=threads, shapes=())
        labels = self.session.signature.task == "segment"
        self._answer = self.session.labels if labels else self.session
        self.shape = (side, side, self.session.signature.channels)
        self.session.warm_up([(rows, side, side) for rows in range(1, max_rows + 1)], labels=labels)

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        return self._answer(images_BHWC)

    def image(self, body: bytes) -> NDArray[np.uint8]:
        """The pixels of one request, a view of its bytes. Raises ValueError for another number of them."""
        return np.frombuffer(body, np.uint8).reshape(self.shape)

    def batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[Any]]:
        """The answer to each of these (H, W, C) images."""
        return list(self(images[0][None] if len(images) == 1 else np.stack(images)))
