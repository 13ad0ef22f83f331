from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import write_image
from muntin.images.truth_masks import read_truth


def test_truth_without_compared_pixels(tmp_path: Path) -> None:
    write_image(tmp_path / "mask.png", np.full((4, 6), 255, np.uint8))
    classes = [ClassInfo(name=name, color=(n, n, n)) for n, name in enumerate(("cell", "ground"))]
    with pytest.raises(DataError, match="every pixel is 255, which counts as ignored, and none is compared"):
        read_truth(tmp_path / "mask.png", (4, 6), classes, 100, [])


def test_truth_with_255_for_the_second_class(tmp_path: Path) -> None:
    classes = [ClassInfo(name="sea", color=(0, 0, 0)), ClassInfo(name="land", color=(255, 255, 255))]
    for values, told in (([0, 255], True), ([0, 1, 255], False), ([0, 1], False)):
        mask = np.resize(np.array(values, np.uint8), (4, 6))
        write_image(tmp_path / "mask.png", mask)
        notes: list[str] = []
        truth, taken = read_truth(tmp_path / "mask.png", (4, 6), classes, 100, notes)
        assert np.array_equal(truth, mask)
        assert taken == {value: classes[value].name for value in values if value != 255}
        assert ("255 counts as ignored, so class 0 alone is compared; if it means land, write 1" in "".join(notes)) is told
