"""Folders of images as every command lists them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muntin.images import write_image
from muntin.images.listing import images_in, paired_splits


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(root / name, np.zeros((4, 4, 3), np.uint8))


def listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in images_in(root)[0]]


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("Imgs", "Labels"), ("image", "annotations"), ("img", "mask"), ("images", "targets")]
)
def test_images_beside_masks(tmp_path: Path, images: str, masks: str) -> None:
    write(tmp_path, f"{images}/a.png", f"{images}/2024/b.png", f"{masks}/a.png", "overview.png", "extra/c.png")
    assert listed(tmp_path) == [f"{images}/a.png", f"{images}/2024/b.png"]
    assert images_in(tmp_path)[1] == (f"{tmp_path}: read {images}/; left out {masks}/ and 2 more",)


def test_images_of_splits(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.png", "train/masks/a.png", "val/images/b.png", "val/masks/b.png", "test/images/c.png")
    assert listed(tmp_path) == ["test/images/c.png", "train/images/a.png", "val/images/b.png"]
    assert paired_splits(tmp_path) == {name: (tmp_path / place / "images", tmp_path / place / "masks") for name, place in
                                       (("train", "train"), ("validation", "val"))}  # fmt: skip
    write(tmp_path, "images/d.png", "masks/d.png")
    assert listed(tmp_path) == ["images/d.png", "train/images/a.png", "val/images/b.png", "test/images/c.png"]


def test_images_of_other_folders(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "cat/b.png", "masks/c.png", ".hidden/d.png", "runs/one/e.png", "predictions/f.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "cat")
    assert listed(tmp_path) == ["a.png", "again/b.png", "masks/c.png"]
    assert [note.partition(": ")[0] for note in images_in(tmp_path)[1]] == [str(tmp_path / name) for name in ("predictions", "runs")]
    assert not paired_splits(tmp_path)
