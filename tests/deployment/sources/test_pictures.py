from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from muntin.deployment.sources.pictures import calibration_pictures, list_pictures
from muntin.errors import DataError
from muntin.images import middle_square, read_image


def test_pictures_of_a_classifier(tmp_path: Path, write_pictures: Callable[..., Path]) -> None:
    for name in ("cat", "dog"):
        write_pictures(tmp_path / name, 10)
    batches = calibration_pictures(tmp_path, channels=3, size=(32, 32), task="classify", largest_count=12)
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 32, 32), (4, 3, 32, 32)]
    pixels = torch.cat(batches)
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 3, 5, 6, 8, 0, 1, 3, 5, 6, 8]  # at equal distances over both folders
    expected = middle_square(read_image(tmp_path / "cat" / "000.png"), 32)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


def test_pictures_of_a_segmenter(tmp_path: Path, write_pictures: Callable[..., Path]) -> None:
    write_pictures(tmp_path / "images", 2)
    write_pictures(tmp_path / "images", 1, height=16, width=16)  # smaller than the size
    write_pictures(tmp_path / "masks", 2)
    (pixels,) = calibration_pictures(tmp_path, channels=3, size=(32, 40), task="segment", largest_count=64)
    assert pixels.shape == (2, 3, 32, 40)
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), read_image(tmp_path / "images" / "001.png")[8:40, 12:52])


def test_folders_without_pictures(tmp_path: Path, write_pictures: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="has no pictures"):
        list_pictures(tmp_path)
    with pytest.raises(DataError, match="none: does not exist: give a folder of pictures"):
        list_pictures(tmp_path / "none")
    write_pictures(tmp_path / "runs" / "one", 1)
    with pytest.raises(DataError, match="has no pictures"):
        list_pictures(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.jpg"):
        calibration_pictures(tmp_path, channels=3, size=(32, 32), task="classify", largest_count=1)
