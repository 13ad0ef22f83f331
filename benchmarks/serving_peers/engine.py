"""The computation of every server here: muntin's engine around one artifact, labels or scores.

All have the same threads and cache of compiled models; each number of rows up to the largest batch is compiled and computed once before a
server is ready. Axes: B images, H rows, W columns, C channels, K classes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin


class Engine:
    """uint8 (B, side, side, C) -> uint8 labels (B, side, side) of a segmentation, float32 scores (B, K) of a classification."""

    def __init__(self, artifact: str, *, side: int, threads: int, max_rows: int) -> None:
        session = muntin.load(artifact, threads=threads, shapes=())
        labels = session.signature.task == "segment"
        self._call = session.labels if labels else session
        self.shape = (side, side, session.signature.channels)
        session.warm_up([(rows, side, side) for rows in range(1, max_rows + 1)], labels=labels)

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        return self._call(images_BHWC)

    def image(self, body: bytes) -> NDArray[np.uint8]:
        """The pixels of one request, a view of its bytes. Raises ValueError for another number of them."""
        return np.frombuffer(body, np.uint8).reshape(self.shape)

    def batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[Any]]:
        """The answer to each of these (H, W, C) images."""
        return list(self(images[0][None] if len(images) == 1 else np.stack(images)))


def parse(*more: str) -> argparse.Namespace:
    """Read ARTIFACT --side N --threads N --max-rows N --port N --batch-timeout S, and further options as text; all are required."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    for name in ("side", "threads", "max-rows", "port", "batch-timeout", *more):
        parser.add_argument(f"--{name}", type=float if name == "batch-timeout" else str if name in more else int, required=True)
    return parser.parse_args()
