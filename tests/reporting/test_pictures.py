"""Small copies of pictures as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muntin.errors import DataError
from muntin.reporting.pictures import Preview, preview


def decoded(copy: Preview) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(copy.uri.partition("base64,")[2]))).convert("RGB")


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_preview_of_a_photograph_is_a_jpeg(tmp_path: Path) -> None:
    noise(300, 600).save(tmp_path / "photo.png")
    copy = preview(tmp_path, "photo.png", edges=(200, 100), limit=10**6)
    assert copy.uri.startswith("data:image/jpeg;base64,")
    assert (copy.width, copy.height) == decoded(copy).size == (200, 100)


def test_preview_of_a_mask_keeps_its_colours(tmp_path: Path) -> None:
    colors = np.uint8([[10, 20, 30], [200, 100, 0], [255, 255, 255]])
    mask = colors[np.random.default_rng(1).integers(0, 3, (300, 300))]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    copy = preview(tmp_path, "mask.png", edges=(100,), limit=10**6)
    assert copy.uri.startswith("data:image/png;base64,")
    kept = {color for _, color in decoded(copy).getcolors(10) or []}
    assert kept == {tuple(color) for color in colors.tolist()}


def test_preview_within_the_limit(tmp_path: Path) -> None:
    noise(400, 400).save(tmp_path / "photo.png")
    copy = preview(tmp_path, "photo.png", edges=(400, 200, 50), limit=20_000)
    assert copy.width == 50
    assert len(copy.uri) <= 20_000


def test_preview_of_a_grey_photograph_is_a_jpeg(tmp_path: Path) -> None:
    noise(64, 64).convert("L").save(tmp_path / "grey.png")
    assert preview(tmp_path, "grey.png", edges=(64,), limit=10**6).uri.startswith("data:image/jpeg")


def test_preview_of_a_tiny_grey_picture(tmp_path: Path) -> None:
    Image.new("L", (7, 5), 40).save(tmp_path / "grey.png")
    copy = preview(tmp_path, "grey.png", edges=(512,), limit=10**6)
    assert (copy.width, copy.height) == (7, 5)
    assert decoded(copy).getpixel((0, 0)) == (40, 40, 40)


def test_preview_link_is_percent_encoded(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    noise(8, 8).save(tmp_path / "a b" / "java:x'.png")
    assert preview(tmp_path, "a b/java:x'.png", edges=(8,), limit=10**6).href == "a%20b/java%3Ax%27.png"


def test_preview_of_a_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"picture 'absent\.png' is not in .*: write it there first"):
        preview(tmp_path, "absent.png", edges=(8,), limit=100)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder"])
def test_preview_of_an_unreadable_picture(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.png"
    noise(64, 64).save(file)
    whole = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    else:
        file.write_bytes({"text": b"hello\nthere", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    with pytest.raises(DataError, match="cannot be read") as caught:
        preview(tmp_path, "x.png", edges=(8,), limit=100)
    assert "\n" not in str(caught.value)
