from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.data.folders import FolderPair
from muntin.data.inspection import (
    MaskClasses,
    classes_in_folders,
    classes_in_masks,
    crop_side,
    equal_stem_notes,
    find_layout,
    ignored_value_notes,
    nested_class_notes,
    picture_channels,
    picture_facts,
    read_some,
    spread,
    unpaired_notes,
    unused_split_notes,
)
from muntin.data.listing import pictures
from muntin.errors import DataError
from muntin.images import read_mask, write_image

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


def masks_in(folder: Path) -> dict[Path, Mask]:
    return read_some(pictures(folder), read_mask)[0]


def classes_of(folder: Path) -> MaskClasses:
    return classes_in_masks(masks_in(folder), folder)


def disc() -> Mask:
    return 255 * (np.hypot(*np.mgrid[-40:40, -40:40]) < 25).astype(np.uint8)


def test_spread_of_few_and_of_many_paths() -> None:
    paths = [Path(str(number)) for number in range(130)]
    assert spread(paths) == paths[::3] and spread(paths[:64]) == paths[:64] and spread([]) == []


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
    assert [(entry.name, entry.value) for entry in classes_in_folders(tmp_path)] == [("cat", None), ("dog: spotted", None)]


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


def test_notes_on_unpaired_files(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name}.jpg" for name in "abcde"), "masks/e.png", "masks/z.png")
    assert unpaired_notes(pair(tmp_path)) == [
        f"{tmp_path}/images: 4 images without a mask: a.jpg, b.jpg, c.jpg and 1 more; `muntin fit` refuses them: add masks, "
        "remove them, or name them under data.skip",
        f"{tmp_path}/masks: 1 mask without an image, not used: z.png",
    ]
    touch(tmp_path, "masks/a_mask.png", "masks/b_mask.png")
    masks = "3 masks without an image, not used: a_mask.png, b_mask.png, z.png"
    assert unpaired_notes(pair(tmp_path))[1].endswith(f"{masks}; 2 of these names fit without their ending '_mask': rename them")
    touch(tmp_path, "images/a.png", "images/c.png")
    assert equal_stem_notes(tmp_path / "masks") == []
    assert equal_stem_notes(tmp_path / "images") == [
        f"{tmp_path}/images: the same stem in a.jpg and a.png, c.jpg and c.png; `muntin fit` refuses them: rename or remove all but one"
    ]


def touch(root: Path, *names: str) -> None:
    """Create empty files. The layout depends on names alone."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pair(root: Path, images: str = "images", masks: str = "masks") -> FolderPair:
    return FolderPair(images=root / images, masks=root / masks)


def test_layout_of_images_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.png", "images/.hidden.png", "images/notes.txt", "masks/a.png", "masks/b.png")
    layout = find_layout(tmp_path, None)
    assert (layout.task, layout.base, layout.validation, layout.test) == ("segment", pair(tmp_path), None, None)
    assert layout.training_pictures() == {"a": tmp_path / "images/a.jpg", "b": tmp_path / "images/b.png"}


def test_layout_of_three_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{kind}/a.png" for split in ("Train", "val", "testing") for kind in ("imgs", "labels")))
    layout = find_layout(tmp_path, None)
    splits = [pair(tmp_path / name, "imgs", "labels") for name in ("Train", "val", "testing")]
    assert [layout.base, layout.validation, layout.test] == splits


def test_layout_of_splits_beside_images_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png", "val/images/b.png", "val/masks/b.png")
    layout = find_layout(tmp_path, None)
    assert (layout.base, layout.validation, layout.test) == (pair(tmp_path), pair(tmp_path / "val"), None)


@pytest.mark.parametrize("around", ["", "train/"])
def test_layout_of_class_folders(tmp_path: Path, around: str) -> None:
    touch(tmp_path, f"{around}cat/1.png", f"{around}dog/1.png", f"{around}runs/fit/log.txt")
    layout = find_layout(tmp_path, None)
    assert (layout.task, layout.base) == ("classify", FolderPair(images=tmp_path / around))
    assert list(layout.training_pictures()) == ["cat/1", "dog/1"]


def test_layout_by_task(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png")
    assert find_layout(tmp_path, None).task == "segment"
    assert find_layout(tmp_path, "classify").task == "classify"


@pytest.mark.parametrize("task", [None, "segment", "classify"])
def test_layout_of_an_empty_folder(tmp_path: Path, task: str | None) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"^[^\n]*holds nothing to make a[^\n]*expected images/ and masks/[^\n]*$"):
        find_layout(tmp_path, task)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="does not exist: name the folder"):
        find_layout(tmp_path / "none", task)  # type: ignore[arg-type]


def test_layout_of_one_class(tmp_path: Path) -> None:
    touch(tmp_path, "apples/1.png")
    with pytest.raises(DataError, match=r"it has one folder with pictures, apples: at least two classes are needed"):
        find_layout(tmp_path, None)


def test_layout_of_a_val_folder_without_masks(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/a.png", "train/masks/a.png", "val/a.png")
    with pytest.raises(DataError, match="val holds no images/ and masks/"):
        find_layout(tmp_path, None)


@pytest.mark.parametrize("folders", [("train", "trainannot", "val", "valannot"), ("images", "gt")])
def test_layout_of_classes_with_reserved_names(tmp_path: Path, folders: tuple[str, ...]) -> None:
    touch(tmp_path, *(f"{folder}/a.png" for folder in folders))
    with pytest.raises(DataError, match=r"expected images/ and masks/ .*; if it is a class, use --task classify") as error:
        find_layout(tmp_path, None)
    assert str(error.value).startswith(str(tmp_path / folders[0]))
    layout = find_layout(tmp_path, "classify")
    assert (layout.base, layout.validation, layout.test) == (FolderPair(images=tmp_path), None, None)
    assert set(layout.training_pictures()) == {f"{folder}/a" for folder in folders}


@pytest.mark.parametrize("inside", ["picture.png", "images/picture.png", "test_a.py", "images/notes.txt"])
def test_layout_with_a_test_folder_without_masks(tmp_path: Path, inside: str) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png", f"test/{inside}")
    assert find_layout(tmp_path, None).test is None
    note = "test/ is not used, since it holds no images/ and masks/ with files: test takes a share of the other pictures"
    assert unused_split_notes(tmp_path) == ([] if inside == "test_a.py" else [note])


def test_notes_on_nested_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.png", "bird/2023/1.png", "runs/fit/1.png")
    (tmp_path / "empty").mkdir()
    (note,) = nested_class_notes(tmp_path)
    assert note == "bird is not a class: only its subfolders (2023) hold pictures; if it is a class, move them up into it"
