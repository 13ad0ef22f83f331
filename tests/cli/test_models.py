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


def test_models_table(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    document = call("models", "--size", "64", "--json").document()
    assert [row["name"] for row in document["models"]] == list(PRESETS)
    small = {row["name"]: row for row in document["models"]}["hybrid-xs"]
    assert small["params"] == sum(p.numel() for p in create_model("hybrid-xs", classes=6).parameters())
    assert all(row["gmacs"] > 0 for row in document["models"])
    some = {name: PRESETS[name] for name in ("hybrid-xxs", "hybrid-xs")}
    monkeypatch.setattr("muntin.models.PRESETS", some)
    text = call("models", "--size", "32")
    assert (text.code, text.err) == (0, "")
    assert all(name in text.out for name in some)
    assert " 0.00 " not in text.out  # a small image takes little, not nothing


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
    assert "classes   cat, dog\nshares    cat: 50.0 %, dog: 50.0 % of 24 images\n" in told
    spaced = tmp_path.rename(tmp_path.with_name("my photos"))
    (spaced / "recipe.yaml").unlink()
    for number in range(24, 70):
        write_image(spaced / "dog" / f"{number}.png", np.full((40, 40, 3), number, np.uint8))
    write_image(spaced / "dog" / "69.bmp", np.zeros((40, 40, 3), np.uint8))
    text = call("init", spaced).out
    assert f"then `muntin fit '{spaced / 'recipe.yaml'}'`" in text
    assert " of 71 images, of which 70 were opened\n" in text and f"note      {spaced}/dog: the same stem in 69.bmp and 69.png; " in text


def test_init_never_overwrites(call: Call, pictures: Path) -> None:
    (pictures / "recipe.yaml").write_text("mine")
    assert "exists already" in call("init", pictures).mistake()
    assert (pictures / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "photographs alone: `muntin init FOLDER --task restore`"),
        (["--task", "classify"], "holds nothing"),
        (["--task", "x"], "segment, classify or restore"),
    ],
)
def test_init_of_an_empty_folder(call: Call, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "empty" / "images").mkdir(parents=True)
    assert says in call("init", tmp_path / "empty", *words).mistake()
    assert [p.name for p in (tmp_path / "empty").iterdir()] == ["images"]


def test_init_of_more_masks_than_are_read(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read, said in ((8, ""), (1, "; from 1 mask, 7 more were not opened")):
        folder = tmp_path / str(read)
        for number in range(8):
            for name in ("images", "masks"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shape = (40, 48, 3) if name == "images" else (40, 48)
                write_image(folder / name / f"p{number:03}.png", np.arange(np.prod(shape)).reshape(shape).astype(np.uint8) % 2)
        if said:
            monkeypatch.setattr("muntin.data.inspection.LOOK_S", 0)
        lines = call("init", folder).out.splitlines()
        assert lines[1] == f"classes   0, 1; 255 in a mask counts as nothing{said}"
        assert lines[2] == f"shares    0: 50.0 %, 1: 50.0 % of the pixels in {'8 masks' if read == 8 else '1 mask'}"
        notes = ["note      1 of 8 masks were read in 5 s: `muntin fit` reads all, and names a value that the recipe lacks"] if said else []
        assert lines[3:] == notes
        assert ("# from 1 mask; 7 more were not opened: add their classes" in (folder / "recipe.yaml").read_text()) == bool(said)
        yaml.safe_load((folder / "recipe.yaml").read_text())


def test_init_of_damaged_and_unpaired_files(call: Call, pictures: Path, tmp_path: Path, tiny_options: str) -> None:
    """What `init` says about them, and what `fit` does with its recipe."""
    images = pictures / "train" / "images"
    for number in range(4, 7):
        write_image(images / f"train-{number}.png", np.zeros((20, 30, 3), np.uint8))
    for number in (4, 5):
        write_image(pictures / "train" / "masks" / f"train-{number}.png", np.zeros((20, 30), np.uint8))
    (images / "train-1.png").write_bytes((images / "train-1.png").read_bytes()[:70])
    document = call("init", pictures, "--json").document()
    assert list(document["shares"]) == ["class-0", "class-1", "class-2"] and 0.9 < sum(document["shares"].values()) < 1
    damaged, unpaired = sorted(document["notes"], key=lambda note: "without a mask" in note)
    assert damaged.startswith("train-1.png is damaged or cut off: left out")
    assert unpaired.startswith(f"{images}: 1 image without a mask: train-6.png; `muntin fit` refuses them: add masks, ")
    words = ["fit", document["recipe"], "-o", tmp_path / "run", "--set", "training.steps=1", "--set", "training.batch_size=2"]
    words += ["--set", "model.name=hybrid-xs", "--set", f"model.options={tiny_options}"]
    assert "train-6.png has no mask: add" in call(*words).mistake()
    (images / "train-6.png").unlink()
    notes = call(*words, "--json").document()["notes"]
    assert notes == [
        "left out by data.skip: train/images/train-1.png",
        "2 of 5 training pictures have a side shorter than data.crop 32 (the smallest is 30×20): the rest of a crop is black and ignored",
    ]
