"""Checks before a search: recipes that would fail hours later, and notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muntin.data import open_source
from muntin.errors import DataError, MuntinError, RecipeError
from muntin.searching import SearchSettings, search_architectures
from muntin.searching.architecture_search import SearchStage
from muntin.searching.preparation import check_data
from muntin.searching.space import parse_space
from muntin.training import load_recipe


def search(tiny: Any, folder: Path, *changes: str, space: Any = None, report: Any = lambda stage: None) -> Any:
    given = SearchSettings(objective="size", candidates=2, finalists=1)
    chosen = parse_space(space or {"depths.0": [1, 2]})
    return search_architectures(load_recipe(tiny.recipe, changes), chosen, folder=folder, root=tiny.root, settings=given, report=report)


@pytest.mark.parametrize(
    ("change", "space", "message"),
    [
        ("model.weights=w.safetensors", None, r"model\.weights w\.safetensors: the file suits one network"),
        ("model.encoder=timm:resnet18", None, r"model\.encoder timm:resnet18: a search varies"),
        ("training.gate_budget=0.5", {"gate": [True, False]}, r"training\.gate_budget 0\.5 with gate false in the space: "),
        ("teacher.model=missing", None, r"teacher\.model missing"),
        ("teacher={model: dense-s, unlabelled: missing}", None, r"teacher"),
    ],
)
def test_refused_recipes(change: str, space: Any, message: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(MuntinError, match=message):
        search(tiny, tmp_path / "search", change, space=space)
    assert not (tmp_path / "search" / "search.json").exists()


def test_gates_of_the_own_model(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"with gate false in model\.options"):
        search(tiny, tmp_path / "search", "training.gate_budget=0.5", "model.options.gate=false")


def test_damaged_picture(tiny: Any, tmp_path: Path) -> None:
    (tiny.root / "train" / "masks" / "train-2.png").write_bytes(b"no picture")
    stages: list[SearchStage] = []
    with pytest.raises(DataError, match=r"train-2\.png"):
        search(tiny, tmp_path / "search", report=stages.append)
    assert {stage.stage for stage in stages} <= {"plan", "data"}


def test_notes_on_the_data(tiny: Any) -> None:
    (tiny.root / "train" / "images" / "notes.txt").write_text("no picture")
    recipe = load_recipe(tiny.recipe, ["data.crop=64"])
    source = open_source(recipe.data, task=recipe.task, root=tiny.root)
    notes = check_data(recipe, source, tiny.root, lambda done, total: None)
    assert any("notes.txt" in note for note in notes)
    assert any("4 of 4 training pictures have a side shorter than data.crop 64" in note for note in notes)
