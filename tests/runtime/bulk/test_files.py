"""Sizes of the calls of a run, and how many of them compute at the same time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muntin.artifact import ClassInfo, Sides, Signature, Sizes
from muntin.images import MAX_PIXELS, write_image
from muntin.runtime.bulk.files import USUAL_STREAMS, ItemSize, call_counts, common_shapes, usual_streams
from muntin.runtime.bulk.items import PredictOptions
from muntin.runtime.short_memory import Parts

CLASSES = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(1, 1, 1)))
SIDES = Sides(multiple=8)
SEGMENT = Signature(task="segment", channels=3, classes=CLASSES, sizes=Sizes(height=SIDES, width=SIDES))
TILES = Parts(tile=64, overlap=0, exact=False)


def test_calls_of_pictures_and_videos() -> None:
    sizes = [ItemSize(height=60, width=130), ItemSize(height=64, width=64, frames=200)]
    assert call_counts(sizes, SEGMENT, TILES) == {(1, 64, 64): 203}
    assert common_shapes(sizes, SEGMENT, TILES) == ((1, 64, 64),)
    assert common_shapes([ItemSize(height=20, width=64), ItemSize(height=64, width=64)], SEGMENT, TILES) == ()
    classify = Signature(task="classify", channels=3, classes=CLASSES, side=32)
    assert common_shapes(sizes, classify, TILES) == ((1, 32, 32),)


@pytest.mark.parametrize(
    ("sides", "threads", "exact", "expected"),
    [
        pytest.param([(48, 48)], 8, False, 1, id="one call"),
        pytest.param([(64, 192)], 8, False, 3, id="tiles of one picture"),
        pytest.param([(640, 640)], 2, False, 2, id="fewer threads"),
        pytest.param([(48, 48)] * 9, 8, False, USUAL_STREAMS, id="many pictures"),
        pytest.param([(640, 640)], 8, True, 1, id="exact tiles"),
    ],
)
def test_usual_streams(tmp_path: Path, sides: list[tuple[int, int]], threads: int, exact: bool, expected: int) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(sides))]
    for path, side in zip(paths, sides, strict=True):
        write_image(path, np.zeros((*side, 3), np.uint8))
    options = PredictOptions(tiles=Parts(tile=64, overlap=None if exact else 0, exact=exact), max_pixels=MAX_PIXELS)
    assert usual_streams(paths, SEGMENT, options, threads) == expected
    (tmp_path / "damaged.png").write_bytes(b"")
    assert usual_streams([tmp_path / "damaged.png"], SEGMENT, options, threads) == 1
