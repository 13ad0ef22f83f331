from __future__ import annotations

from typing import Any

import pytest

from muntin.artifact import ClassInfo, Sides, Signature, Sizes
from muntin.errors import ArtifactError
from muntin.runtime.bulk.smaller_tiles import Tiles, in_smaller_tiles

CLASSES = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(1, 1, 1)))


def signature(multiple: int = 1, **options: Any) -> Signature:
    sides = Sides(multiple=multiple)
    return Signature(task="segment", channels=3, classes=CLASSES, sizes=Sizes(height=sides, width=sides), **options)


def attempts(first: Tiles, enough: int, longest: int = 5000, multiple: int = 1, error: Exception | None = None) -> tuple[list[Any], Tiles]:
    """Sides and overlaps that were tried where `enough` is the largest side that fits, and the tiles that gave the value."""
    tried = []

    def compute(tiles: Tiles) -> str:
        tried.append((tiles.tile, tiles.overlap))
        if tiles.tile is None or tiles.tile > enough:
            raise error or MemoryError("no room")
        return "value"

    value, used = in_smaller_tiles(compute, first, signature(multiple), longest)
    assert value == "value"
    return tried, used


def test_half_the_side_until_it_fits() -> None:
    tried, used = attempts(Tiles(tile=512, overlap=100), 100)
    assert tried == [(512, 100), (256, 50), (128, 25), (64, 12)]
    assert used == Tiles(tile=64, overlap=12)
    assert attempts(Tiles(tile=512, overlap=None), 512)[0] == [(512, None)]
    assert attempts(Tiles(tile=512, overlap=None), 100, longest=200)[0] == [(512, None), (100, None)]
    assert attempts(Tiles(tile=480, overlap=None), 200, multiple=96)[0] == [(480, None), (192, None)]
    refused = ArtifactError("OpenVINO cannot compute images: std::bad_alloc")
    assert attempts(Tiles(tile=128, overlap=0), 64, error=refused)[0] == [(128, 0), (64, 0)]


@pytest.mark.parametrize(
    ("tiles", "error", "count"),
    [
        (Tiles(tile=512, overlap=None), MemoryError("no room"), 4),
        (Tiles(tile=None, overlap=None), MemoryError("no room"), 1),
        (Tiles(tile=32, overlap=None), MemoryError("no room"), 1),
        (Tiles(tile=512, overlap=None), ArtifactError("the model gave other scores"), 1),
        (Tiles(tile=512, overlap=None), ValueError("a fault of ours: out of memory"), 1),
    ],
)
def test_error_of_the_smallest_tile(tiles: Tiles, error: Exception, count: int) -> None:
    tried: list[Tiles] = []

    def compute(tiles: Tiles) -> None:
        tried.append(tiles)
        raise error

    with pytest.raises(type(error), match=str(error)):
        in_smaller_tiles(compute, tiles, signature(), 5000)
    assert len(tried) == count
