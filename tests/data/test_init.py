from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from muntin.data.config import DataConfig, open_source
from muntin.data.init import find_layout, remarks, write_recipe
from muntin.data.source import SPLITS
from muntin.errors import DataError, RecipeError
from muntin.runtime.images import write_image
from muntin.training.config import TrainingConfig


def fill(folder: Path, masks: list[np.ndarray[Any, np.dtype[np.uint8]]], names: tuple[str, str] = ("images", "masks")) -> None:
    for number, mask in enumerate(masks):
        for name, picture in ((names[0], np.full((*mask.shape[:2], 3), 100, dtype=np.uint8)), (names[1], mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_image(folder / name / f"p{number}.png", picture)
        # Pixels that differ, so that the pictures are colour pictures.
        write_image(folder / names[0] / f"p{number}.png", np.random.default_rng(0).integers(0, 255, (*mask.shape[:2], 3), dtype=np.uint8))


def masks_of(values: list[int], count: int = 10, side: int = 70) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    generator = np.random.default_rng(0)
    return [np.array(values, dtype=np.uint8)[generator.integers(0, len(values), (side, side + 9))] for _ in range(count)]


def opened(path: Path) -> tuple[dict[str, Any], Any]:
    """The recipe, and its source after every file was checked."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = open_source(DataConfig.model_validate(recipe["data"]), root=path.parent)
    assert source.task == recipe["task"]
    assert all(len(source.split(name)) for name in SPLITS)
    source.check()
    return recipe, source


def test_images_and_masks(tmp_path: Path) -> None:
    fill(tmp_path / "My Müll: photos", masks_of([0, 1, 4, 255]))
    recipe, source = opened(write_recipe(tmp_path / "My Müll: photos"))
    assert recipe["name"] == "My-M-ll-photos"  # what a folder of results can be called everywhere
    assert recipe["task"] == "segment"
    assert set(recipe) == {"name", "task", "seed", "data", "model", "training", "quantization", "compression"}
    data = recipe["data"]
    assert (data["images"], data["masks"], data["ignore"], data["crop"], data["channels"]) == ("images", "masks", 255, 64, 3)
    assert [entry["value"] for entry in data["classes"]] == [0, 1, 4]
    assert [entry["name"] for entry in data["classes"]] == ["class-0", "class-1", "class-2"]
    assert len(source.classes) == 3
    assert sum(len(source.split(name)) for name in SPLITS) == 10


def test_it_trains_at_the_default_rate_and_says_that_defaults_may_differ(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 1]))
    text = write_recipe(tmp_path).read_text()
    assert yaml.safe_load(text)["training"]["learning_rate"] == TrainingConfig().learning_rate
    assert "which may be another value than the one here" in text


def test_every_line_of_values_is_explained(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 1]))
    for line in write_recipe(tmp_path).read_text().splitlines():
        key, _, value = line.strip().partition(": ")
        if value and not key.startswith(("#", "- {")):
            assert "  # " in line


def test_a_run_inside_the_class_folders_is_no_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path, masks_of([0, 1]), (name, "unused"))
    shutil.rmtree(tmp_path / "unused")
    path = write_recipe(tmp_path)
    (tmp_path / "runs" / "pets" / "checkpoints").mkdir(parents=True)  # where `fit` of that recipe puts its run
    recipe, source = opened(path)
    assert [entry["name"] for entry in recipe["data"]["classes"]] == [entry.name for entry in source.classes] == ["cat", "dog"]
    assert source.notes == (f"{tmp_path}: the folders runs are no classes of the recipe and are not used",)
    path.unlink()
    assert opened(write_recipe(tmp_path))[0] == recipe


def test_binary_masks_of_0_and_255(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 255]))
    recipe, _ = opened(write_recipe(tmp_path))
    assert [entry["value"] for entry in recipe["data"]["classes"]] == [0, 255]
    assert recipe["data"]["ignore"] is None


def test_colored_masks(tmp_path: Path) -> None:
    colors = np.array([[0, 0, 0], [200, 0, 0], [0, 99, 0]], dtype=np.uint8)
    fill(tmp_path, [colors[mask] for mask in masks_of([0, 1, 2])])
    recipe, _ = opened(write_recipe(tmp_path))
    assert [entry["value"] for entry in recipe["data"]["classes"]] == [[0, 0, 0], [0, 99, 0], [200, 0, 0]]
    assert [entry["color"] for entry in recipe["data"]["classes"]] == [[0, 0, 0], [0, 99, 0], [200, 0, 0]]


def test_palettes_give_their_colors(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 1]))
    for path in (tmp_path / "masks").iterdir():
        with Image.open(path) as opened_mask:
            mask = Image.fromarray(np.array(opened_mask))
        mask.putpalette([1, 2, 3, 200, 30, 30])
        mask.save(path)
    recipe, _ = opened(write_recipe(tmp_path))
    assert [(entry["value"], entry["color"]) for entry in recipe["data"]["classes"]] == [(0, [1, 2, 3]), (1, [200, 30, 30])]


def test_train_val_and_test_folders(tmp_path: Path) -> None:
    for name, count in (("Train", 3), ("val", 2), ("test", 1)):
        fill(tmp_path / name, masks_of([0, 1], count), ("imgs", "labels"))
    recipe, source = opened(write_recipe(tmp_path))
    assert recipe["data"]["images"] == "Train/imgs"
    assert recipe["data"]["validation"] == {"images": "val/imgs", "masks": "val/labels"}
    assert [len(source.split(name)) for name in SPLITS] == [3, 2, 1]
    assert "seed" not in recipe["data"]


def test_without_a_test_folder_a_share_is_taken(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("valid", 2)):
        fill(tmp_path / name, masks_of([0, 1], count))
    recipe, source = opened(write_recipe(tmp_path))
    assert recipe["data"]["test"] == 0.15
    assert len(source.split("validation")) == 2
    assert len(source.split("train")) + len(source.split("test")) == 12


@pytest.mark.parametrize("around", ["", "train"])
def test_folders_of_classes(tmp_path: Path, around: str) -> None:
    for name in ("cat", "dog: spotted"):
        for number in range(6):
            (tmp_path / around / name).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / around / name / f"{number}.png", np.zeros((40, 50), dtype=np.uint8))
    recipe, source = opened(write_recipe(tmp_path))
    assert recipe["task"] == "classify"
    assert [entry.name for entry in source.classes] == ["cat", "dog: spotted"]
    assert (recipe["data"]["channels"], recipe["data"]["crop"]) == (1, 32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere names are text")
def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    """As an archive of another system unpacks: a class is refused by name, a picture is as good as any."""
    for name in ("cat", "dog"):
        for number in range(6):
            (tmp_path / name).mkdir(exist_ok=True)
            write_image(tmp_path / name / f"{number}.png", np.zeros((40, 50), dtype=np.uint8))
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"caf\xe9.png"))
    path = write_recipe(tmp_path)
    _, source = opened(path)
    assert sum(len(source.split(name)) for name in SPLITS) == 12
    path.unlink()
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"a name in it is no UTF-8 \(the recipe would say .*caf\\udce9"):
        write_recipe(tmp_path)
    assert not path.exists()
    config = DataConfig(source="folders", images=tmp_path)
    with pytest.raises(DataError, match=r"caf\\udce9': a class is named by its folder, and this name is no UTF-8: rename it"):
        open_source(config, root=tmp_path)


def test_it_never_overwrites(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 1]))
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        write_recipe(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_recipe_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "photos", masks_of([0, 1]))
    monkeypatch.chdir(tmp_path)
    path = write_recipe("photos", output=Path("mine.yaml"))
    assert path == Path("mine.yaml") and not (tmp_path / "photos" / "recipe.yaml").exists()
    recipe, source = opened(path)
    assert recipe["name"] == "photos" and recipe["data"]["masks"] == str(tmp_path / "photos" / "masks")
    assert sum(len(source.split(name)) for name in SPLITS) == 10
    with pytest.raises(RecipeError, match=r"mine\.yaml exists already"):
        write_recipe("photos", output=Path("mine.yaml"))
    with pytest.raises(RecipeError, match=r"none/mine\.yaml cannot be written: name a file in a folder that may be written to by --output"):
        write_recipe("photos", output=Path("none/mine.yaml"))


def test_names_that_a_mac_spells_otherwise_are_the_same(tmp_path: Path) -> None:
    for number in range(10):
        for folder, name in (("images", f"e\u0301{number}.png"), ("masks", f"\u00e9{number}.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / name, masks_of([0, 1])[number])
    _, source = opened(write_recipe(tmp_path))
    names = [sample.name for split in SPLITS for sample in source.split(split)]
    assert sorted(names) == [f"e\u0301{number}" for number in range(10)]  # as they lie there: names decide splits


def test_nothing_usable_tells_the_layout(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for task in (None, "segment", "classify"):
        with pytest.raises(DataError) as error:
            write_recipe(tmp_path, task=task)
        assert "expected images/ and masks/" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        write_recipe(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_task_decides_between_readings(tmp_path: Path) -> None:
    fill(tmp_path, masks_of([0, 1]))
    assert find_layout(tmp_path, None).task == "segment"
    assert find_layout(tmp_path, "classify").task == "classify"


@pytest.mark.parametrize("folders", [("train", "trainannot", "val", "valannot"), ("images", "gt")])
def test_folders_that_are_named_as_pictures_or_a_split_are_no_classes_unless_they_are_said_to_be(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    for pair in zip(folders[::2], folders[1::2], strict=True):
        fill(tmp_path, masks_of([0, 1]), pair)
    with pytest.raises(DataError, match=r"expected images/ and masks/ .*; if it is a class, say so by --task classify") as error:
        write_recipe(tmp_path)
    assert str(error.value).startswith(str(tmp_path / folders[0]))
    assert not (tmp_path / "recipe.yaml").exists()
    recipe, _ = opened(write_recipe(tmp_path, task="classify"))
    assert sorted(entry["name"] for entry in recipe["data"]["classes"]) == sorted(folders)


@pytest.mark.parametrize("grey", ["cat", "dog"])
def test_grey_pictures_of_one_class_and_colour_ones_of_another_are_read_in_colour(tmp_path: Path, grey: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(10):
            write_image(tmp_path / name / f"{number}.png", np.zeros((40, 40) if name == grey else (40, 40, 3), np.uint8))
    assert opened(write_recipe(tmp_path))[0]["data"]["channels"] == 3


def test_masks_that_cannot_be_classes(tmp_path: Path) -> None:
    fill(tmp_path / "one", masks_of([4]))
    with pytest.raises(DataError, match="two classes at least"):
        write_recipe(tmp_path / "one")
    blurred = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    fill(tmp_path / "many", [blurred] * 5)
    with pytest.raises(DataError, match="JPEG blurs them"):
        write_recipe(tmp_path / "many")
    fill(tmp_path / "few", masks_of([0, 1], 2))
    with pytest.raises(DataError, match="too few to split"):
        write_recipe(tmp_path / "few")


def test_masks_with_smooth_edges_are_no_classes(tmp_path: Path) -> None:
    disc = 255 * (np.hypot(*np.mgrid[-40:40, -40:40]) < 25).astype(np.uint8)
    small = np.asarray(Image.fromarray(disc).resize((60, 60), Image.Resampling.BICUBIC))
    fill(tmp_path / "resized", [small] * 5)
    with pytest.raises(DataError, match=r"their edges were smoothed, as by resizing; save them as PNG .* cut them at 128"):
        write_recipe(tmp_path / "resized")
    fill(tmp_path / "jpeg", [disc] * 5)
    for path in (tmp_path / "jpeg" / "masks").iterdir():
        Image.open(path).convert("L").save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    with pytest.raises(DataError, match=r"p0\.jpg is a JPEG, which blurs classes into each other; save masks as PNG"):
        write_recipe(tmp_path / "jpeg")
    fill(tmp_path / "painted", [np.stack([disc, 0 * disc, 255 - disc], -1)] * 5)
    for path in (tmp_path / "painted" / "masks").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    with pytest.raises(DataError, match=r"p0\.jpg is a JPEG"):
        write_recipe(tmp_path / "painted")


@pytest.mark.parametrize(
    ("values", "ignored"),
    [
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
def test_255_is_ignored_beside_numbers_of_classes_alone(tmp_path: Path, values: list[int], ignored: int | None) -> None:
    fill(tmp_path, masks_of(values))
    recipe, _ = opened(write_recipe(tmp_path))
    assert recipe["data"]["ignore"] == ignored
    assert [entry["value"] for entry in recipe["data"]["classes"]] == [value for value in values if value != ignored]


def test_a_val_folder_without_masks(tmp_path: Path) -> None:
    fill(tmp_path / "train", masks_of([0, 1]))
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="val holds no images/ and masks/"):
        write_recipe(tmp_path)


def test_the_fourth_channel_of_tiffs_is_kept_where_it_is_more_than_opaque(tmp_path: Path) -> None:
    for folder, fourth in (("near infrared", None), ("opaque", 255)):
        fill(tmp_path / folder, masks_of([0, 1]))
        for number, path in enumerate(sorted((tmp_path / folder / "images").iterdir())):
            image = np.random.default_rng(number).integers(0, 256, (70, 79, 4)).astype(np.uint8)
            if fourth is not None:
                image[:, :, 3] = fourth
            path.unlink()
            Image.fromarray(image, "RGBA").save(path.with_suffix(".tif"))
    assert opened(write_recipe(tmp_path / "near infrared"))[0]["data"]["channels"] == 4
    assert opened(write_recipe(tmp_path / "opaque"))[0]["data"]["channels"] == 3


def test_few_pictures_of_each_class_are_split_so_that_no_split_lacks_one(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{number}.png", np.full((40, 40, 3), number, np.uint8))
    _, source = opened(write_recipe(tmp_path))
    for name in ("train", "validation", "test"):
        assert {int(sample.target) for sample in source.split(name)} == {0, 1, 2}
    assert source.notes == ()


def test_a_class_folder_of_folders_is_told(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / ("cat", "dog", "bird/2023")[number % 3]
        folder.mkdir(exist_ok=True, parents=True)
        write_image(folder / f"{number}.png", np.full((40, 40, 3), number, np.uint8))
    (tmp_path / "empty").mkdir()
    (told,) = remarks(tmp_path, None)
    assert told.startswith("bird is no class: it holds no pictures itself, its folders do (2023): move them up")


def test_255_that_may_be_a_class_in_some_masks_is_told(tmp_path: Path) -> None:
    half = [np.where(np.eye(70, dtype=bool), value, 0).astype(np.uint8) for value in (1, 255) for _ in range(5)]
    fill(tmp_path / "mixed", half)
    (told,) = remarks(tmp_path / "mixed" / "images", tmp_path / "mixed" / "masks")
    assert told.startswith("255 counts as nothing, and the 5 of 10 masks that hold it hold no class but 0")
    for mask in half:
        mask[0, :2] = 1, 255
    fill(tmp_path / "bordered", half)
    assert remarks(tmp_path / "bordered" / "images", tmp_path / "bordered" / "masks") == []


def test_one_class_alone_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "apples").mkdir()
    write_image(tmp_path / "apples" / "1.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(DataError, match=r"it has one folder with pictures, apples: two classes at least can be told apart"):
        write_recipe(tmp_path)


def test_splits_beside_images_and_masks_are_used(tmp_path: Path) -> None:
    for folder, count in ((tmp_path, 8), (tmp_path / "val", 3), (tmp_path / "test", 4)):
        fill(folder, masks_of([0, 1], count))
    recipe, source = opened(write_recipe(tmp_path))
    assert recipe["data"]["validation"] == {"images": "val/images", "masks": "val/masks"}
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [8, 3, 4]


@pytest.mark.parametrize("inside", ["picture.png", "images/picture.png", "test_a.py", ""])
def test_what_has_the_name_of_a_split_beside_images_and_is_none_is_left_alone(tmp_path: Path, inside: str) -> None:
    fill(tmp_path, masks_of([0, 1]))
    (tmp_path / "test" / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "test").mkdir(exist_ok=True)
    if inside.endswith(".png"):
        write_image(tmp_path / "test" / inside, np.zeros((40, 50, 3), np.uint8))
    elif inside:
        (tmp_path / "test" / inside).write_text("")
    recipe, _ = opened(write_recipe(tmp_path))
    assert recipe["data"]["test"] == 0.15
    told = ["test/ holds no images/ and masks/ with files in them, and is not used: test gets a share of the others"]
    assert remarks(tmp_path / "images", tmp_path / "masks") == (told if inside.endswith(".png") else [])


@pytest.mark.parametrize("name", ["do\x7fg", "o\u0085x", "\u00a0\U0001f600", "a\u2028b", 'q"uote\\'])
def test_a_class_whose_name_yaml_does_not_take_raw(tmp_path: Path, name: str) -> None:
    for folder in ("cat", name):
        fill(tmp_path, masks_of([0, 1]), (folder, "unused"))
    shutil.rmtree(tmp_path / "unused")
    recipe, source = opened(write_recipe(tmp_path))
    assert name in [entry["name"] for entry in recipe["data"]["classes"]]
    assert {sample.name.split("/")[0] for sample in source.split("train")} == {"cat", name}
