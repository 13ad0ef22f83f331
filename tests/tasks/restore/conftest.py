"""A folder of smooth pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from muntin.images import write_image
from smooth_pictures import smooth_picture


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of ten pictures of 41 x 50 to 50 x 41."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        write_image(folder / f"p{number}.png", smooth_picture(41 + number, 50 - number, number))
    return folder
