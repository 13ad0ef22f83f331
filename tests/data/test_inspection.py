from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.data.inspection import (
    LOOK_S,
    MaskClasses,
    MaskFacts,
    classes_in_folders,
    classes_in_masks,
    crop_side,
    ignored_value_notes,
    mask_facts,
    picture_channels,
    picture_facts,
    read_some,
)
from muntin.errors import DataError
from muntin.images import write_image
from muntin.images.listing import pictures, subfolders

Mask = np.ndarray[Any, np.dtype[np.uint8]]


def masks_of(values: list[int], count: int = 5) -> list[Mask]:
    generator = np.random.default_rng(0)
    return [np.array(values, dtype=np.uint8)[generator.integers(0, len(values), (70, 79))] for _ in range(count)]


def write_all(folder: Path, pictures: Iterable[Mask], suffix: str = ".png", **options: Any) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"p{number}{suffix}")
        Image.fromarray(picture).save(paths[-1], **options)
    return paths


def masks_in(folder: Path) -> dict[Path, MaskFacts]:
    return read_some(pictures(folder), mask_facts)[0]


def classes_of(folder: Path) -> MaskClasses:
    return classes_in_masks(masks_in(folder), folder)


def disc() -> Mask:
    return 255 * (np.hypot(*np.mgrid[-40:40, -40:40]) < 25).astype(np.uint8)


def test_look_that_ends_early() -> None:
    paths, seconds = [Path(f"{number:03d}") for number in range(130)], iter(range(1000))
    read, errors = read_some(paths, str, clock=lambda: next(seconds))
    assert len(read) == LOOK_S and list(read) == sorted(read) != paths[: len(read)] and not errors
    assert list(read_some(paths, str, clock=lambda: 0)[0]) == paths


def test_values_of_very_few_pixels(tmp_path: Path) -> None:
    masks = [np.tile(np.array([0, 1], np.uint8), (300, 150)) for _ in range(3)]
    masks[1][0, :9] = 7
    write_all(tmp_path / "masks", masks)
    (stray,) = classes_of(tmp_path / "masks").stray
    assert stray.value == 7 and stray.text == "9 pixels in 1 mask (p1.png)"
    masks[2][0:2, :40] = 7
    write_all(tmp_path / "more", masks)
    assert not classes_of(tmp_path / "more").stray


@pytest.mark.parametrize(
    ("values", "ignored"),
    [
        ([0, 1, 4], 255),
        ([0, 1, 4, 255], 255),
        ([0, 255], None),
        ([0, 128, 255], None),
        ([0, 127, 255], None),
        ([0, 100, 255], None),
        ([0, 85, 170, 255], None),
        ([0, 1, 255], 255),
        ([0, 5, 255], 255),
        ([0, 33, 255], 255),
        ([0, 3, 8, 40, 100, 255], 255),
        ([*range(150), 255], 255),
    ],
)
def test_classes_of_number_masks(tmp_path: Path, values: list[int], ignored: int | None) -> None:
    write_all(tmp_path / "masks", masks_of(values))
    seen = classes_of(tmp_path / "masks")
    classes = seen.classes
    assert seen.ignore == ignored
    assert sum(seen.shares) == pytest.approx(1 - (ignored in values) / len(values), abs=0.02) and len(seen.shares) == len(classes)
    assert [entry.value for entry in classes] == [value for value in values if value != ignored]
    assert [entry.name for entry in classes] == [f"class-{index}" for index in range(len(classes))]
    assert len({entry.color for entry in classes}) == len(classes)


def test_classes_of_color_masks(tmp_path: Path) -> None:
    colors = np.array([[0, 0, 0], [200, 0, 0], [0, 99, 0]], dtype=np.uint8)
    write_all(tmp_path / "masks", [colors[mask] for mask in masks_of([0, 1, 2])])
    seen = classes_of(tmp_path / "masks")
    expected = [(0, 0, 0), (0, 99, 0), (200, 0, 0)]
    assert [entry.value for entry in seen.classes] == [entry.color for entry in seen.classes] == expected
    assert seen.ignore is None and seen.shares == pytest.approx([1 / 3] * 3, abs=0.02)


def test_classes_of_palette_masks(tmp_path: Path) -> None:
    for path in write_all(tmp_path / "masks", masks_of([0, 1])):
        with Image.open(path) as file:
            mask = Image.fromarray(np.array(file))
        mask.putpalette([1, 2, 3, 200, 30, 30])
        mask.save(path)
    classes = classes_of(tmp_path / "masks").classes
    assert [(entry.value, entry.color) for entry in classes] == [(0, (1, 2, 3)), (1, (200, 30, 30))]


def test_masks_with_too_few_or_too_many_values(tmp_path: Path) -> None:
    write_all(tmp_path / "one", masks_of([4]))
    with pytest.raises(DataError, match="hold 1 classes: at least two classes are needed"):
        classes_of(tmp_path / "one")
    write_all(tmp_path / "many", [np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)])
    with pytest.raises(DataError, match="JPEG blurs them"):
        classes_of(tmp_path / "many")


def test_masks_with_smoothed_edges(tmp_path: Path) -> None:
    resized = np.asarray(Image.fromarray(disc()).resize((60, 60), Image.Resampling.BICUBIC))
    write_all(tmp_path / "resized", [resized] * 5)
    with pytest.raises(DataError, match=r"their edges were smoothed, as by resizing; save them as PNG .* threshold them at 128"):
        classes_of(tmp_path / "resized")


@pytest.mark.parametrize("mask", [disc(), np.stack([disc(), 0 * disc(), 255 - disc()], -1)], ids=["grey", "color"])
def test_masks_in_jpeg(tmp_path: Path, mask: Mask) -> None:
    write_all(tmp_path / "masks", [mask] * 5, ".jpg", quality=90)
    with pytest.raises(DataError, match=r"p0\.jpg is a JPEG, which blurs classes into each other; save masks as PNG"):
        classes_of(tmp_path / "masks")


def test_note_on_255_that_may_be_a_class(tmp_path: Path) -> None:
    masks = [np.where(np.eye(70, dtype=bool), value, 0).astype(np.uint8) for value in (1, 255) for _ in range(5)]
    write_all(tmp_path / "mixed", masks)
    (note,) = ignored_value_notes(masks_in(tmp_path / "mixed"))
    assert note.startswith("255 is ignored, and the 5 of 10 masks that hold it hold no class but 0")
    for mask in masks:
        mask[0, :2] = 1, 255
    write_all(tmp_path / "bordered", masks)
    assert ignored_value_notes(masks_in(tmp_path / "bordered")) == []


def test_classes_of_folders(tmp_path: Path) -> None:
    for name in ("dog: spotted", "cat"):
        write_all(tmp_path / name, masks_of([0], 1))
    (tmp_path / "runs").mkdir()
    classes = classes_in_folders(tmp_path, subfolders(tmp_path)[:2])
    assert [(entry.name, entry.value) for entry in classes] == [
        ("cat", None),
        ("dog: spotted", None),
    ]


@pytest.mark.parametrize(
    ("shapes", "suffix", "channels"),
    [
        ([(40, 40), (40, 40)], ".png", 1),
        ([(40, 40), (40, 40, 3)], ".png", 3),
        ([(40, 40, 3), (40, 40)], ".png", 3),
        ([(40, 40, 4), (40, 40, 4)], ".png", 3),
        ([(40, 40, 4), (40, 40, 4)], ".tif", 4),
        ([(40, 40, 7), (40, 40, 7)], ".npy", 7),
        ([(40, 40, 7), (40, 40, 3)], ".npy", 3),
    ],
)
def test_channels_of_pictures(tmp_path: Path, shapes: list[tuple[int, ...]], suffix: str, channels: int) -> None:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}{suffix}" for number in range(len(shapes))]
    for path, shape in zip(paths, shapes, strict=True):
        picture = generator.integers(0, 256, shape, dtype=np.uint8)
        write_image(path, picture) if suffix == ".npy" else Image.fromarray(picture).save(path)
    assert picture_channels(read_some(paths, picture_facts)[0]) == channels


def test_channels_of_opaque_tiffs(tmp_path: Path) -> None:
    opaque = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    opaque[:, :, 3] = 255
    assert picture_channels(read_some(write_all(tmp_path / "pictures", [opaque] * 2, ".tif"), picture_facts)[0]) == 3


@pytest.mark.parametrize(
    ("side", "task", "crop"), [(70, "segment", 64), (20, "segment", 32), (600, "segment", 256), (600, "classify", 224)]
)
def test_crop_side_of_pictures(tmp_path: Path, side: int, task: Any, crop: int) -> None:
    paths = write_all(tmp_path / "pictures", [np.zeros((side, side + 9), np.uint8)])
    assert crop_side(read_some(paths, picture_facts)[0], task) == crop


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    paths = write_all(tmp_path / "pictures", [np.zeros((40, 50), np.uint8)] * 3)
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    facts, errors = read_some(paths, picture_facts)
    assert list(facts) == [paths[0], paths[2]] and list(errors) == [paths[1]] and "damaged or cut off" in str(errors[paths[1]])
    with pytest.raises(DataError, match=r"p1\.png is damaged"):
        read_some(paths[1:2], picture_facts)
