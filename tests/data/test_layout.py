from __future__ import annotations

from pathlib import Path

import pytest

from muntin.data.layout import equal_stem_notes, find_layout, training_pictures
from muntin.errors import DataError
from muntin.tasks.classify.folders import nested_class_notes
from muntin.tasks.folders import FolderPair
from muntin.tasks.segment.folders import unpaired_notes, unused_split_notes


def touch(root: Path, *names: str) -> None:
    """Create empty files. The layout depends on names alone."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pair(root: Path, images: str = "images", masks: str = "masks") -> FolderPair:
    return FolderPair(images=root / images, masks=root / masks)


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


def test_layout_of_images_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.png", "images/.hidden.png", "images/notes.txt", "masks/a.png", "masks/b.png")
    layout = find_layout(tmp_path, None)
    assert (layout.task, layout.base, layout.validation, layout.test) == ("segment", pair(tmp_path), None, None)
    assert training_pictures(layout) == {"a": tmp_path / "images/a.jpg", "b": tmp_path / "images/b.png"}
    with pytest.raises(DataError, match=f"{tmp_path} holds both images and masks: name it"):
        find_layout(tmp_path / "images", None)


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
    assert list(training_pictures(layout)) == ["cat/1", "dog/1"]


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
    assert set(training_pictures(layout)) == {f"{folder}/a" for folder in folders}


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
    only = "bird is not a class: only its subfolders (2023) hold pictures"
    assert note == f"{only}; if it is a class, run init with --task classify, without this recipe"
    assert list(training_pictures(find_layout(tmp_path, "classify"))) == ["bird/2023/1", "cat/1", "dog/1"]
    deep = tmp_path / "deep"
    touch(deep, "cat/2023/1.png", "dog/2023/1.png")
    with pytest.raises(DataError, match=r"if cat, dog are classes, whose pictures lie in folders below: --task classify"):
        find_layout(deep, None)
