from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from muntin.images import write_image
from muntin.models import PRESETS, create_model
from muntin.training import load_recipe

Call = Callable[..., Any]


def test_models_table(call: Call) -> None:
    document = call("models", "--size", "64", "--json").document()
    assert [row["name"] for row in document["models"]] == list(PRESETS)
    small = {row["name"]: row for row in document["models"]}["hybrid-xs"]
    assert small["params"] == sum(p.numel() for p in create_model("hybrid-xs", classes=6).parameters())
    assert all(row["gmacs"] > 0 for row in document["models"])
    text = call("models", "--size", "64")
    assert (text.code, text.err) == (0, "")
    assert all(name in text.out for name in PRESETS)
    tiny = call("models", "--size", "32")
    assert tiny.code == 0 and " 0.00 " not in tiny.out  # a small image takes little, not nothing


@pytest.fixture
def pictures(tmp_path: Path, write_tiny: Callable[..., Any]) -> Path:
    write_tiny(tmp_path / "data").recipe.unlink()
    return tmp_path / "data"


def test_init_recipe_trains(call: Call, pictures: Path, tmp_path: Path, tiny_options: str) -> None:
    path = Path(call("init", pictures, "--json").document()["recipe"])
    assert path == pictures / "recipe.yaml"
    assert [entry.value for entry in load_recipe(path).data.classes] == [0, 1, 2]
    changes = ["training.steps=1", "training.batch_size=2", "model.name=hybrid-xs", f"model.options={tiny_options}"]
    words = [word for change in changes for word in ("--set", change)]
    assert call("fit", path, "-o", tmp_path / "run", *words, "--json").document()["step"] == 1


@pytest.fixture
def tiny_options(tmp_path: Path, write_tiny: Callable[..., Any]) -> str:
    options = write_tiny(tmp_path / "unused").content["model"]["options"]
    return yaml.safe_dump(options, default_flow_style=True, width=1000).strip()


def test_init_output(call: Call, pictures: Path) -> None:
    answer = call("init", pictures)
    assert answer.code == 0
    assert f"(task: segment): read it, rename the classes, then `muntin fit {pictures / 'recipe.yaml'}`" in answer.out
    assert "classes   0, 1, 2; 255 in a mask counts as nothing" in answer.out


def test_init_output_option(call: Call, pictures: Path, tmp_path: Path, tiny_options: str) -> None:
    path = tmp_path / "my recipe.yaml"
    answer = call("init", pictures, "-o", path)
    assert f"wrote     {path}" in answer.out and f"`muntin fit '{path}'`" in answer.out
    assert "#     muntin fit 'my recipe.yaml' " in path.read_text() and not (pictures / "recipe.yaml").exists()
    changes = ["training.steps=1", "training.batch_size=2", "model.name=hybrid-xs", f"model.options={tiny_options}"]
    words = [word for change in changes for word in ("--set", change)]
    assert call("fit", path, "-o", tmp_path / "run", *words, "--json").document()["step"] == 1


def test_init_of_class_folders(call: Call, tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{number}.png", np.full((40, 40, 3), number, np.uint8))
    told = call("init", tmp_path).out
    assert f"(task: classify): read it, then `muntin fit {tmp_path / 'recipe.yaml'}`" in told
    assert "classes   cat, dog\n" in told
    spaced = tmp_path.rename(tmp_path.with_name("my photos"))
    (spaced / "recipe.yaml").unlink()
    assert f"then `muntin fit '{spaced / 'recipe.yaml'}'`" in call("init", spaced).out


def test_init_never_overwrites(call: Call, pictures: Path) -> None:
    (pictures / "recipe.yaml").write_text("mine")
    assert "exists already" in call("init", pictures).mistake()
    assert (pictures / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "holds nothing to make a recipe of"), (["--task", "classify"], "holds nothing"), (["--task", "x"], "give segment or classify")],
)
def test_init_of_an_empty_folder(call: Call, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "empty" / "images").mkdir(parents=True)
    assert says in call("init", tmp_path / "empty", *words).mistake()
    assert [p.name for p in (tmp_path / "empty").iterdir()] == ["images"]


def test_init_counts_examined_masks(call: Call, tmp_path: Path) -> None:
    for count, said in ((8, ""), (100, "; seen in 50 of 100 masks")):
        folder = tmp_path / str(count)
        for number in range(count):
            for name, value in (("images", 100), ("masks", number % 2)):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shape = (40, 48, 3) if name == "images" else (40, 48)
                write_image(folder / name / f"p{number}.png", np.full(shape, value, np.uint8))
        assert call("init", folder).out.rstrip().endswith(said or "counts as nothing")
        assert ("# seen in 50 of 100 masks: add the classes of the others" in (folder / "recipe.yaml").read_text()) == bool(said)
        yaml.safe_load((folder / "recipe.yaml").read_text())
