"""Pictures written to files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.errors import DataError
from muntin.images import (
    decode_image,
    encode_png,
    write_image,
    write_whole,
)


def photo(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def one_line(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_arrays_that_a_format_cannot_hold(tmp_path: Path) -> None:
    wrong: list[tuple[str, np.ndarray[Any, Any]]] = [
        ("a.png", photo(channels=5)),
        ("a.png", photo().astype(np.float32)),
        ("a.jpg", photo(channels=4)),
        ("a.gif", photo()),
        ("none/a.png", photo()),
    ]
    for name, image in wrong:
        with pytest.raises(DataError) as error:
            write_image(tmp_path / name, image)
        one_line(error, "cannot write")
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path) -> None:
    write_image(tmp_path / "a.npy", photo(2, 2))
    before = (tmp_path / "a.npy").read_bytes()
    program = f"""
import resource, numpy as np
from muntin.images import write_image
from muntin.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_image({str(tmp_path / "a.npy")!r}, np.zeros((99, 99, 3), np.uint8))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.count("\n") == 1
    assert "cannot write" in done.stdout
    assert (tmp_path / "a.npy").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_write_whole_replaces(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_encoded_labels() -> None:
    labels = np.random.default_rng(6).integers(0, 3, (9, 11)).astype(np.uint8)
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    with Image.open(io.BytesIO(encode_png(labels, colors))) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), labels)
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), np.array(colors, np.uint8)[labels])
    np.testing.assert_array_equal(decode_image(encode_png(labels), 1)[:, :, 0], labels)
