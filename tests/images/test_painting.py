"""Labels in colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import (
    colorize,
    overlay,
    to_rgb,
)

CLASSES = (ClassInfo(name="sea", color=(0, 0, 200)), ClassInfo(name="land", color=(0, 200, 0)))


def photo(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_colorize_and_overlay() -> None:
    labels = np.array([[0, 1, 255]], dtype=np.uint8)
    assert colorize(labels, CLASSES).tolist() == [[[0, 0, 200], [0, 200, 0], [0, 0, 0]]]
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    assert overlay(image, labels, CLASSES, 0.5).tolist() == [[[50, 50, 150], [50, 150, 50], [100, 100, 100]]]
    np.testing.assert_array_equal(overlay(image, labels, CLASSES, 0), image)
    assert overlay(photo(1, 3, 7), labels.astype(np.int64), CLASSES).shape == (1, 3, 3)
    with pytest.raises(DataError):
        colorize(np.array([[2]]), CLASSES)
    with pytest.raises(DataError):
        overlay(photo(2, 3), labels, CLASSES)


def test_to_rgb() -> None:
    assert to_rgb(photo(channels=1)).shape == (12, 17, 3)
    np.testing.assert_array_equal(to_rgb(photo(channels=8)), photo(channels=8)[:, :, :3])
