"""`muntin search`, whole: by latency, on a tiny data set."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from muntin.cli import app
from muntin.cli.search import command
from muntin.cli.search.description import search_record
from muntin.errors import MuntinError, RecipeError
from muntin.models import ModelConfig
from muntin.searching import SearchSettings, search_architectures
from muntin.searching.architecture_search import SearchStage
from muntin.searching.space import Architecture, parse_space
from muntin.searching.study import StudyPoint
from muntin.training import load_recipe, read_checkpoint

SPACE = "dims.0: [32, 48]\ndepths.0: [1, 2]\n"
SETTINGS = {"objective": "latency", "candidates": 4, "finalists": 1}
CHANGES = [
    "seed=3", "training.class_weights=auto", "model.options.attention=local", "model.options.dims=[32]", "model.options.depths=[1]",
]  # fmt: skip


def search(tiny: Any, output: Path, *words: str, **settings: Any) -> Any:
    space = tiny.root / "space.yaml"
    space.write_text(SPACE)
    given = [word for name, value in {**SETTINGS, **settings}.items() for word in (f"--{name}", str(value))]
    changes = [word for change in CHANGES for word in ("--set", change)]
    return CliRunner().invoke(app, ["search", str(tiny.recipe), "--space", str(space), "-o", str(output), *given, *changes, *words])


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_sizes")
def test_search(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.searching.finalists.export_side", lambda recipe: recipe.data.crop)  # the only size that they take
    output = tmp_path / "search"
    first = search(tiny, output, "--json")
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert result["objective"] == "latency" and all(one["cost"] > 0 for one in result["front"])
    assert any(note.startswith("recipe: class weights in the loss: ") for note in result["notes"])
    assert not any("ended at step" in note for note in result["notes"])
    own, best = result["networks"]
    assert result["finished"] and own["name"] == "recipe"
    assert Path(best["artifact"], "manifest.json").is_file() and best["bytes"] > 0 and best["ms"] > 0
    trained = read_checkpoint(Path(best["run"]))
    point = next(one for one in result["front"] if f"{one['number']:03d}" == best["name"])
    assert {name: trained.recipe.model.options[name] for name in point["options"]} == point["options"]
    for one in result["front"]:  # the command's recipe is that of the network
        file = output / "networks" / f"{one['number']:03d}.yaml"
        recipe = load_recipe(file)
        assert one["command"].startswith(f"muntin fit {file} -o ") and recipe.seed == 3
        assert {name: recipe.model.options[name] for name in one["options"]} == one["options"]
        if one is point:
            assert recipe.model_copy(update={"data": trained.recipe.data}) == trained.recipe
    assert Path(result["page"]).read_text(encoding="utf-8").count("muntin fit") == len(result["front"])

    again = search(tiny, output)  # everything is done
    assert again.exit_code == 0 and "wrote" in again.output and best["name"] in again.output
    assert json.loads((output / "search.json").read_text())["results"]["front"] == result["front"]
    ended = search_architectures(
        load_recipe(tiny.recipe, CHANGES), parse_space(yaml.safe_load(SPACE)), folder=output, root=tiny.root,
        settings=SearchSettings(**SETTINGS),
    )  # fmt: skip
    record = search_record(replace(ended, networks=ended.networks[1:]), title="t", metric="m")  # the minutes ended before the recipe's own
    assert [point.number for point in record.picture.points] == [0]
    other = search(tiny, output, candidates=3)
    assert isinstance(other.exception, RecipeError) and "settings.candidates was 4, is 3" in str(other.exception)


def test_dry_run(tiny: Any, tmp_path: Path) -> None:
    result = search(tiny, tmp_path / "search", "--dry-run", "--minutes", "0.2")
    assert result.exit_code == 0 and not (tmp_path / "search").exists()
    text = " ".join(result.stdout.split())
    for words in ("plan candidates: ", "trained for a ninth", "rough until some", "--minutes covers", "too short: "):
        assert words in text
    plan = json.loads(search(tiny, tmp_path / "search", "--dry-run", "--json", objective="size").stdout)
    assert plan["scored"] == 0 and plan["total_s"] == plan["work_s"] > 0 and not plan["too_short"]


def test_command_that_goes_on() -> None:
    given = SearchSettings(objective="size", minutes=0.5, candidates=9)
    words = shlex.split(command._same_command(Path("a b.yaml"), Path("s.yaml"), given, Path("out"), ["seed=3"]))
    assert words[:3] == ["muntin", "search", "a b.yaml"] and words[-2:] == ["--set", "seed=3"]
    pairs = dict(zip(words[3::2], words[4::2], strict=True))
    options = {"--space": "s.yaml", "--output": "out", "--objective": "size", "--minutes": "0.5", "--candidates": "9"}
    assert pairs == {**options, "--set": "seed=3"}
    assert command._same_command(Path("r.yaml"), None, SearchSettings(), None, ()) == "muntin search r.yaml"


def test_front_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = StringIO()
    monkeypatch.setattr(command, "err", Console(file=file, force_terminal=True, width=120, markup=False))
    one = Architecture(config=ModelConfig())
    point = StudyPoint(number=6, chosen={"depths.0": 2, "stem": (8, 16)}, architecture=one, scores=(0.5,), cost=2.25)
    with command._shown(lambda: None, "latency") as show:
        show(SearchStage(stage="study", done=0, total=9, left=150.0))
        show(SearchStage(stage="study", done=1, total=9, front=[point]))
    assert "candidates: 0 of 9, about 2.5 min left" in file.getvalue() and "candidates: 1 of 9" in file.getvalue()
    assert "007" in file.getvalue() and "2.25 ms" in file.getvalue() and "stem [8, 16]" in file.getvalue()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "minutes 0: give a number above 0, or leave it out"),
        (["--objective", "beauty"], "objective 'beauty': give latency, size or memory"),
        (["--set", "model.name=timm:resnet18", "--set", "model.options={}"], "model timm:resnet18: a search changes muntin's own networks"),
    ],
)
def test_refused(tiny: Any, tmp_path: Path, words: list[str], message: str) -> None:
    error = search(tiny, tmp_path / "search", *words).exception
    assert isinstance(error, MuntinError) and message in str(error)
    assert not (tmp_path / "search" / "trials").exists()


def test_space_that_makes_no_network(tiny: Any, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("dims.0: [40]\n")
    error = CliRunner().invoke(app, ["search", str(tiny.recipe), "--space", str(space), "-o", str(tmp_path / "search")]).exception
    assert isinstance(error, RecipeError) and "dims.0 40" in str(error)
