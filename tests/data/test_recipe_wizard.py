from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from muntin.data.config import DataConfig, open_source
from muntin.data.recipe_wizard import write_recipe
from muntin.data.source import SPLITS
from muntin.errors import DataError, RecipeError
from muntin.images import read_mask, write_image
from muntin.training.config import ModelChoice, TrainingConfig
from muntin.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/models.md")


def fill(folder: Path, values: list[int], count: int = 10, names: tuple[str, str] = ("images", "masks")) -> None:
    """Write colour images and masks of the given values."""
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        mask = np.array(values, dtype=np.uint8)[generator.integers(0, len(values), (70, 79))]
        write_image(folder / names[0] / f"p{number}.png", generator.integers(0, 255, (70, 79, 3), dtype=np.uint8))
        write_image(folder / names[1] / f"p{number}.png", mask)


def fill_classes(folder: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 6) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(folder / name / f"{number}.png", np.full((40, 50), number, dtype=np.uint8))


def open_recipe(path: Path) -> tuple[dict[str, Any], Any]:
    """The recipe, and its source after every file was checked."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = open_source(load_recipe(path).data, task=load_recipe(path).task, root=path.parent)
    assert source.task == recipe["task"]
    assert all(len(source.split(name)) for name in SPLITS)
    source.check()
    return recipe, source


def test_subfolders_and_what_lacks_its_counterpart(tmp_path: Path) -> None:
    for part in ("images/a", "masks/a", "images/b"):
        (tmp_path / part).mkdir(parents=True)
    fill(tmp_path, [0, 1], names=("images/a", "masks/a"))
    (tmp_path / "images" / "b" / "x.png").write_bytes((tmp_path / "images" / "a" / "p0.png").read_bytes())
    path, survey = write_recipe(tmp_path)
    assert survey.notes == (f"{tmp_path}/images: the pictures in b are not used: {tmp_path}/masks has no such folder",)
    _, source = open_recipe(path)
    assert sum(len(source.split(name)) for name in SPLITS) == 10
    path.unlink()
    (tmp_path / "masks" / "a" / "p2.png").unlink()
    (tmp_path / "images" / "a" / "p5.png").unlink()
    notes = write_recipe(tmp_path)[1].notes
    assert any("1 image without a mask: a/p2.png" in note for note in notes)
    assert any("1 mask without an image, not used: a/p5.png" in note for note in notes)


def test_hints_on_balance(tmp_path: Path) -> None:
    fill(tmp_path / "maps", [0] * 200 + [1])
    (note,) = write_recipe(tmp_path / "maps")[1].notes
    assert note.startswith("few pixels are of 1 (0.") and "training.class_weights: auto" in note
    fill_classes(tmp_path / "kinds", ("cat", "dog"), 20)
    fill_classes(tmp_path / "kinds", ("cow",), 5)
    (note,) = write_recipe(tmp_path / "kinds")[1].notes
    assert note.startswith("few pictures are of cow (11.1 %), beside 44.4 % of the most frequent class: set training.class_weights: auto")
    fill(tmp_path / "even", [0, 1])
    assert write_recipe(tmp_path / "even")[1].notes == ()


def test_documents_name_the_first_model(tmp_path: Path) -> None:
    """README and docs say which model the recipe of `init` trains, and for how long."""
    fill(tmp_path, [0, 1])
    path, _ = write_recipe(tmp_path)
    recipe = load_recipe(path)
    name, training = recipe.model.name, recipe.training
    minutes = {5: "five", 10: "ten", 15: "fifteen"}[round(training.minutes or 0)]
    readme, quickstart, models = (" ".join((ROOT / page).read_text(encoding="utf-8").split()) for page in PAGES)
    assert f"# trains a small network: four to {minutes} minutes" in readme
    assert f"The recipe trains `{name}` on {training.steps:,} batches of {training.batch_size} crops" in quickstart
    assert f"ends after {minutes} minutes (`training.minutes: {training.minutes:g}`)" in quickstart
    assert f"Begin with `{name}` and plain INT8: this is what the recipe of `muntin init` trains, in {minutes} minutes at most" in models
    assert f"`{name}` (the default)" in models
    assert ModelChoice().name == name


def test_recipe_for_images_and_masks(tmp_path: Path) -> None:
    fill(tmp_path / "My Müll: photos", [0, 1, 4, 255])
    recipe, source = open_recipe(write_recipe(tmp_path / "My Müll: photos")[0])
    assert recipe["name"] == "My-M-ll-photos"
    assert recipe["task"] == "segment"
    assert set(recipe) == {"name", "task", "seed", "data", "model", "training", "quantization", "compression"}
    data = recipe["data"]
    assert (data["images"], data["masks"], data["ignore"], data["crop"], data["channels"]) == ("images", "masks", 255, 64, 3)
    assert [entry["value"] for entry in data["classes"]] == [0, 1, 4]
    assert [entry["name"] for entry in data["classes"]] == ["class-0", "class-1", "class-2"]
    assert len(source.classes) == 3
    assert sum(len(source.split(name)) for name in SPLITS) == 10


@pytest.mark.parametrize("folder", ["my photos", "_1 (neu) für später", "[x]", "über", "2024"])
def test_recipe_in_a_folder_of_another_name(tmp_path: Path, folder: str) -> None:
    fill(tmp_path / folder, [0, 1])
    open_recipe(write_recipe(tmp_path / folder)[0])


def test_recipe_with_the_default_learning_rate(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    text = write_recipe(tmp_path)[0].read_text()
    assert yaml.safe_load(text)["training"]["learning_rate"] == TrainingConfig().learning_rate
    assert "has its default, which may differ from the value here" in text


@pytest.mark.parametrize("classify", [True, False])
def test_recipe_with_a_comment_on_every_value(tmp_path: Path, classify: bool) -> None:
    fill_classes(tmp_path) if classify else fill(tmp_path, [0, 1])
    for line in write_recipe(tmp_path)[0].read_text().splitlines():
        key, _, value = line.strip().partition(": ")
        if value and not key.startswith(("#", "- {")):
            assert "  # " in line


def test_recipe_with_results_beside_the_classes(tmp_path: Path) -> None:
    fill_classes(tmp_path)
    path, _ = write_recipe(tmp_path)
    (tmp_path / "runs" / "pets" / "checkpoints").mkdir(parents=True)  # where `fit` of that recipe puts its results
    recipe, source = open_recipe(path)
    assert [entry["name"] for entry in recipe["data"]["classes"]] == [entry.name for entry in source.classes] == ["cat", "dog"]
    assert source.notes == (f"{tmp_path}: the folders runs are not classes of the recipe and are not used",)
    path.unlink()
    assert open_recipe(write_recipe(tmp_path)[0])[0] == recipe


def test_recipe_for_colored_masks(tmp_path: Path) -> None:
    colors = np.array([[0, 0, 0], [200, 0, 0], [0, 99, 0]], dtype=np.uint8)
    fill(tmp_path, [0, 1])
    for path in (tmp_path / "masks").iterdir():
        write_image(path, colors[np.random.default_rng(0).integers(0, 3, (70, 79))])
    recipe, _ = open_recipe(write_recipe(tmp_path)[0])
    assert recipe["data"]["ignore"] is None
    for key in ("value", "color"):
        assert [entry[key] for entry in recipe["data"]["classes"]] == [[0, 0, 0], [0, 99, 0], [200, 0, 0]]


def test_recipe_for_three_split_folders(tmp_path: Path) -> None:
    for name, count in (("Train", 3), ("val", 2), ("test", 1)):
        fill(tmp_path / name, [0, 1], count, ("imgs", "labels"))
    recipe, source = open_recipe(write_recipe(tmp_path)[0])
    assert recipe["data"]["images"] == "Train/imgs"
    assert recipe["data"]["validation"] == {"images": "val/imgs", "masks": "val/labels"}
    assert [len(source.split(name)) for name in SPLITS] == [3, 2, 1]
    assert "seed" not in recipe["data"]


def test_recipe_without_a_test_folder(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("valid", 2)):
        fill(tmp_path / name, [0, 1], count)
    path = write_recipe(tmp_path)[0]
    recipe, source = open_recipe(path)
    assert recipe["data"]["test"] == 0.15
    said = (
        "test: 0.15  # 15 % of the pictures, not trained on, score the model once, at the end; or folders of its own: {images: ..., masks"
    )
    assert said in path.read_text()
    assert len(source.split("validation")) == 2
    assert len(source.split("train")) + len(source.split("test")) == 12


@pytest.mark.parametrize("around", ["", "train"])
def test_recipe_for_class_folders(tmp_path: Path, around: str) -> None:
    fill_classes(tmp_path / around, ("cat", "dog: spotted"))
    recipe, source = open_recipe(write_recipe(tmp_path)[0])
    assert recipe["task"] == "classify"
    assert [entry.name for entry in source.classes] == ["cat", "dog: spotted"]
    assert (recipe["data"]["channels"], recipe["data"]["crop"]) == (1, 32)


def test_recipe_for_few_pictures_of_each_class(tmp_path: Path) -> None:
    fill_classes(tmp_path, ("a", "b", "c"), count=4)
    _, source = open_recipe(write_recipe(tmp_path)[0])
    for name in SPLITS:
        assert {int(sample.target) for sample in source.split(name)} == {0, 1, 2}
    assert source.notes == ()


def test_recipe_for_too_few_pictures(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1], 2)
    with pytest.raises(DataError, match="holds 2 pictures, too few to split into 3 parts"):
        write_recipe(tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems refuse such file names")
def test_recipe_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    fill_classes(tmp_path)
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"caf\xe9.png"))
    path, _ = write_recipe(tmp_path)
    _, source = open_recipe(path)
    assert sum(len(source.split(name)) for name in SPLITS) == 12
    path.unlink()
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    message = r"caf\\udce9': a class has the name of its folder, and this name is not valid UTF-8: rename the folder"
    with pytest.raises(DataError, match=message):
        write_recipe(tmp_path)
    assert not path.exists()
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="folders", images=tmp_path), task="classify", root=tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems refuse such file names")
def test_recipe_for_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    fill_classes(folder)
    assert yaml.safe_load(write_recipe(folder)[0].read_text())["data"]["images"] == "."
    with pytest.raises(DataError, match=r"caf\\udce9.* is not valid UTF-8, so a recipe cannot name it"):
        write_recipe(folder, output=tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_recipe_that_exists(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        write_recipe(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_recipe_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "photos", [0, 1])
    monkeypatch.chdir(tmp_path)
    path, _ = write_recipe("photos", output=Path("mine.yaml"))
    assert path == Path("mine.yaml") and not (tmp_path / "photos" / "recipe.yaml").exists()
    recipe, source = open_recipe(path)
    assert recipe["name"] == "photos" and recipe["data"]["masks"] == str(tmp_path / "photos" / "masks")
    assert sum(len(source.split(name)) for name in SPLITS) == 10
    with pytest.raises(RecipeError, match=r"mine\.yaml exists already"):
        write_recipe("photos", output=Path("mine.yaml"))
    with pytest.raises(RecipeError, match=r"none/mine\.yaml cannot be written: use --output to name a file in a folder"):
        write_recipe("photos", output=Path("none/mine.yaml"))


def test_recipe_for_names_with_decomposed_accents(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    for number in range(10):
        for folder, letter in (("images", "e\u0301"), ("masks", "\u00e9")):
            (tmp_path / folder / f"p{number}.png").rename(tmp_path / folder / f"{letter}{number}.png")
    _, source = open_recipe(write_recipe(tmp_path)[0])
    names = [sample.name for split in SPLITS for sample in source.split(split)]
    assert sorted(names) == [f"e\u0301{number}" for number in range(10)]  # as the file system stores them


def test_recipe_with_an_unused_test_folder(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    (tmp_path / "test").mkdir()
    write_image(tmp_path / "test" / "picture.png", np.zeros((40, 50, 3), np.uint8))
    path, survey = write_recipe(tmp_path)
    recipe, _ = open_recipe(path)
    assert recipe["data"]["test"] == 0.15
    (note,) = survey.notes
    assert note.startswith("test/ is not used")


def test_recipe_with_a_nested_class_folder(tmp_path: Path) -> None:
    fill_classes(tmp_path)
    fill_classes(tmp_path / "bird", ("2023",))
    path, survey = write_recipe(tmp_path)
    recipe, _ = open_recipe(path)
    assert [entry["name"] for entry in recipe["data"]["classes"]] == ["cat", "dog"]
    (note,) = survey.notes
    assert note.startswith("bird is not a class")


@pytest.mark.parametrize("name", ["do\x7fg", "o\u0085x", "\u00a0\U0001f600", "a\u2028b", 'q"uote\\'])
def test_recipe_with_class_names_that_yaml_escapes(tmp_path: Path, name: str) -> None:
    fill_classes(tmp_path, ("cat", name))
    recipe, source = open_recipe(write_recipe(tmp_path)[0])
    assert name in [entry["name"] for entry in recipe["data"]["classes"]]
    assert {sample.name.split("/")[0] for sample in source.split("train")} == {"cat", name}


def truncate(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:60])


def test_recipe_for_a_stray_value(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1], 20)
    mask = read_mask(tmp_path / "masks" / "p3.png").copy()
    mask[0, :9] = 7
    write_image(tmp_path / "masks" / "p3.png", mask)
    path, survey = write_recipe(tmp_path)
    assert "value: 7, color: [0, 158, 115]}  # stray? 9 pixels in 1 mask (p3.png)\n" in path.read_text()
    assert survey.notes[-1].startswith("stray? value 7 has 9 pixels in 1 mask (p3.png): if that is a mistake, correct the mask")


def test_mask_of_another_size(tmp_path: Path) -> None:
    """Found before the training, which would refuse the picture."""
    fill(tmp_path, [0, 1], 12)
    write_image(tmp_path / "images" / "p3.png", np.zeros((9, 7, 3), np.uint8))
    path, survey = write_recipe(tmp_path)
    recipe, source = open_recipe(path)
    source.check()
    assert recipe["data"]["skip"] == ["images/p3.png"]
    assert re.fullmatch(r"p3\.png is 7×9 and its mask \d+×\d+: left out by data\.skip in the recipe", survey.notes[0])


def test_recipe_for_damaged_files(tmp_path: Path) -> None:
    """An image, a mask, and more than a split needs; the recipe leaves them out and can be trained."""
    fill(tmp_path, [0, 1], 12)
    truncate(tmp_path / "images" / "p3.png", tmp_path / "masks" / "p5.png")
    path, survey = write_recipe(tmp_path)
    recipe, source = open_recipe(path)
    assert recipe["data"]["skip"] == ["images/p3.png", "masks/p5.png"]
    assert re.search(r'- "images/p3\.png"  # is damaged or cut off\n', path.read_text())
    assert survey.notes[0] == "2 files for one reason (is damaged or cut off): p3.png, p5.png: left out by data.skip in the recipe"
    assert (survey.counted, survey.unopened) == (11, 0)
    assert source.notes == ("left out by data.skip: images/p3.png, masks/p5.png",)
    assert {sample.name for name in SPLITS for sample in source.split(name)} == {f"p{n}" for n in range(12)} - {"p3", "p5"}


def test_recipe_for_damaged_pictures_of_classes(tmp_path: Path) -> None:
    fill_classes(tmp_path, count=8)
    truncate(*(tmp_path / "cat" / f"{number}.png" for number in (0, 2, 4)))
    (tmp_path / "cat" / "6.png").write_bytes(b"")
    path, survey = write_recipe(tmp_path, output=tmp_path / "mine.yaml")
    recipe, source = open_recipe(path)
    assert recipe["data"]["skip"] == [str(tmp_path / "cat" / f"{number}.png") for number in (0, 2, 4, 6)]
    assert [note.partition(": left out")[0] for note in survey.notes] == [
        "3 files for one reason (is damaged or cut off): 0.png, 2.png, 4.png", "6.png is empty (0 bytes)"
    ]  # fmt: skip
    assert sum(len(source.split(name)) for name in SPLITS) == 12
    truncate(*tmp_path.rglob("*.png"))
    path.unlink()
    with pytest.raises(DataError, match="damaged or cut off"):
        write_recipe(tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()
