from __future__ import annotations

from typing import Any

import pytest

from muntin.artifact import ClassInfo, Sides, Signature, Sizes
from muntin.errors import ArtifactError
from muntin.runtime.short_memory import Parts, compute_in_parts

CLASSES = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(1, 1, 1)))


def signature(multiple: int = 1, **options: Any) -> Signature:
    sides = Sides(multiple=multiple)
    return Signature(task="segment", channels=3, classes=CLASSES, sizes=Sizes(height=sides, width=sides), **options)


def attempts(first: Parts, enough: int, longest: int = 5000, multiple: int = 1, error: Exception | None = None) -> tuple[list[Any], Parts]:
    """Sides and overlaps that were tried where `enough` is the largest side that fits, and the tiles that gave the value."""
    tried = []

    def compute(tiles: Parts) -> str:
        tried.append((tiles.tile, tiles.overlap))
        if tiles.tile is None or tiles.tile > enough:
            raise error or MemoryError("no room")
        return "value"

    value, used = compute_in_parts(compute, first, lambda parts: parts.smaller(signature(multiple), longest))
    assert value == "value"
    return tried, used


def test_half_the_side_until_it_fits() -> None:
    tried, used = attempts(Parts(tile=512, overlap=100), 100)
    assert tried == [(512, 100), (256, 50), (128, 25), (64, 12)]
    assert used == Parts(tile=64, overlap=12)
    assert attempts(Parts(tile=512, overlap=None), 512)[0] == [(512, None)]
    assert attempts(Parts(tile=512, overlap=None), 100, longest=200)[0] == [(512, None), (100, None)]
    assert attempts(Parts(tile=480, overlap=None), 200, multiple=96)[0] == [(480, None), (192, None)]
    refused = ArtifactError("OpenVINO cannot compute images: std::bad_alloc")
    assert attempts(Parts(tile=128, overlap=0), 64, error=refused)[0] == [(128, 0), (64, 0)]


@pytest.mark.parametrize(
    ("tiles", "error", "count"),
    [
        (Parts(tile=512, overlap=None), MemoryError("no room"), 4),
        (Parts(tile=32, overlap=None), MemoryError("no room"), 1),
        (Parts(tile=512, overlap=None), ArtifactError("the model gave other scores"), 1),
        (Parts(tile=512, overlap=None), ValueError("a fault of ours: out of memory"), 1),
    ],
)
def test_error_of_the_smallest_tile(tiles: Parts, error: Exception, count: int) -> None:
    tried: list[Parts] = []

    def compute(tiles: Parts) -> None:
        tried.append(tiles)
        raise error

    with pytest.raises(type(error), match=str(error)):
        compute_in_parts(compute, tiles, lambda parts: parts.smaller(signature(), 5000))
    assert len(tried) == count


def test_rows_before_tiles() -> None:
    parts, sides = Parts(rows=5), []
    assert parts.smaller(None, 0) == Parts(rows=1) and Parts(rows=1).smaller(None, 0) is None
    while (parts := parts.smaller(signature(), 3000)) is not None:
        sides.append(parts.tile)
    assert sides == [None, 512, 256, 128, 64]
    assert Parts().smaller(signature(), 200) == Parts(tile=100)
    assert Parts().smaller(signature(), 64) is None
