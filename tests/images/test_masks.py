"""Masks from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.images import (
    read_mask,
    write_image,
)


def photo(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_class_numbers(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [3, 2, 255]], dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200] + [7] * 756)
    palette.save(tmp_path / "palette.png")
    write_image(tmp_path / "grey.png", labels)
    np.save(tmp_path / "a.npy", labels.astype(np.int32))
    for name in ("palette.png", "grey.png", "a.npy"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), labels)
    assert read_mask(tmp_path / "palette.png", colors=True)[0].tolist() == [[9, 9, 9], [200, 0, 0], [0, 200, 0]]
    assert read_mask(tmp_path / "grey.png", colors=True)[0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    Image.fromarray(labels.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), labels.astype(np.uint16) * 300)


@pytest.mark.parametrize(("depth", "expected"), [(1, [0, 1, 1, 0]), (2, [0, 1, 2, 3]), (4, [0, 5, 10, 15])])
def test_masks_of_few_bits(write_png: Callable[..., None], tmp_path: Path, depth: int, expected: list[int]) -> None:
    bits = "".join(f"{value:0{depth}b}" for value in expected).ljust(16, "0")
    packed = int(bits, 2).to_bytes(2, "big")[: -(-4 * depth // 8)]
    write_png(tmp_path / "a.png", width=4, height=1, depth=depth, kind=0, rows=b"\x00" + packed)
    assert read_mask(tmp_path / "a.png").tolist() == [expected]


def test_colour_masks(tmp_path: Path) -> None:
    for channels in (3, 4):
        image = photo(channels=channels)
        write_image(tmp_path / "a.png", image)
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), image[:, :, :3])
