from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from muntin.data.config import open_source
from muntin.data.recipe_wizard import write_recipe
from muntin.errors import DataError
from muntin.images import write_image
from muntin.training.recipe import Recipe, load_recipe
from smooth_pictures import smooth_picture


def read(root: Path) -> Recipe:
    path, _ = write_recipe(root, task="restore")
    return load_recipe(path)


def test_photographs_in_the_folder(photographs: Path) -> None:
    recipe = read(photographs)
    assert recipe.task == "restore"
    assert recipe.data.images == Path()
    assert recipe.data.degrade is not None
    assert recipe.data.degrade.noise == 25
    assert recipe.model.name == "hybrid-xs"
    assert "cross-entropy" not in (photographs / "recipe.yaml").read_text()
    assert open_source(recipe.data, task=recipe.task, root=photographs).notes == ()  # none on the recipe
    for folder, name in (("2024", "p1.png"), ("2024", "p2.png"), ("test", "p3.png")):
        (photographs / folder).mkdir(exist_ok=True)
        (photographs / name).rename(photographs / folder / name)
    for results in ("predictions", "run/pictures"):  # what muntin wrote
        (photographs / results).mkdir(parents=True)
        shutil.copy(photographs / "p4.png", photographs / results / "p4.png")
    (photographs / "run" / "checkpoints").mkdir()
    (photographs / "val").mkdir()  # without pictures: no split
    (photographs / "recipe.yaml").unlink()
    recipe = read(photographs)
    assert isinstance(recipe.data.validation, float)
    source = open_source(recipe.data, task=recipe.task, root=photographs)
    assert [sample.name for sample in source.split("test")] == ["p3"]
    trained = {sample.name for name in ("train", "validation") for sample in source.split(name)}
    assert trained == {"2024/p1", "2024/p2", *(f"p{number}" for number in (0, *range(4, 10)))}


def test_pairs_in_split_folders(photographs: Path, tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    for split in ("train", "val", "test"):
        for folder in ("noisy", "clean"):
            shutil.copytree(photographs, root / split / folder)
    write_image(root / "train" / "noisy" / "alone.png", smooth_picture(40, 40))
    path, survey = write_recipe(root, task="restore")
    data = yaml.safe_load(path.read_text())["data"]
    assert (data["images"], data["targets"]) == ("train/noisy", "train/clean")
    assert data["validation"] == {"images": "val/noisy", "targets": "val/clean"}
    assert load_recipe(path).data.targets == Path("train/clean")
    assert any("alone.png" in note for note in survey.notes)


def test_folders_without_photographs(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected photographs"):
        read(tmp_path / "empty")
    root = tmp_path / "mixed"
    for split in ("train", "val"):
        shutil.copytree(photographs, root / split / "images")
    shutil.copytree(photographs, root / "train" / "targets")
    with pytest.raises(DataError, match="does not hold pictures as"):
        read(root)
