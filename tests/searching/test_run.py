"""Whole searches up to the training of the best few, which `tests/cli/search` covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact
from muntin.data import open_source
from muntin.errors import MuntinError, RecipeError
from muntin.models import ModelConfig
from muntin.searching import SearchSettings, search_architectures
from muntin.searching.finalists import Finalist, rank_correlation, spread, train_finalist
from muntin.searching.point_recipe import place_name
from muntin.searching.preparation import base_config
from muntin.searching.run import SearchStage
from muntin.searching.space import Architecture, parse_space
from muntin.searching.study import StudyPoint, pareto_front
from muntin.training import load_recipe
from muntin.training.progress.report import FitProgress

SPACE = parse_space({"dims.0": [32, 48], "depths.0": [1, 2], "latents": [2, 4], "decoder": [8, 16]})


class Stopped(BaseException):
    """The end of a process."""


def search(tiny: Any, folder: Path, *, until: tuple[str, int], **settings: Any) -> list[StudyPoint]:
    """Search until a stage has done so much; returns the front as it was last shown."""
    front: list[StudyPoint] = []

    def report(stage: SearchStage) -> None:
        front[:] = stage.front
        if (stage.stage, stage.done) == until:
            raise Stopped

    given = SearchSettings(**{"objective": "memory", "candidates": 8, "finalists": 1, **settings})
    with pytest.raises(Stopped):
        search_architectures(load_recipe(tiny.recipe), SPACE, folder=folder, root=tiny.root, settings=given, report=report)
    return front


def test_killed_and_resumed_search(tiny: Any, tmp_path: Path) -> None:
    whole = search(tiny, tmp_path / "whole", until=("train", 0))
    search(tiny, tmp_path / "parts", until=("supernet", 2))
    search(tiny, tmp_path / "parts", until=("study", 3))
    resumed = search(tiny, tmp_path / "parts", until=("train", 0))
    assert resumed == whole and whole
    more = search(tiny, tmp_path / "parts", until=("train", 0), candidates=11)
    assert json.loads((tmp_path / "parts" / "search.json").read_text())["first_candidates"] == 8
    assert pareto_front([*resumed, *more]) == more  # no point got lost
    with pytest.raises(RecipeError, match=r"with other settings \(settings\.candidates was 11, is 8\): give those again"):
        search(tiny, tmp_path / "parts", until=("train", 0))
    (tmp_path / "parts" / "search.json").write_text("{}")
    with pytest.raises(MuntinError, match="not the settings of a search"):
        search(tiny, tmp_path / "parts", until=("train", 0))


def test_minutes_end_the_study(tiny: Any, tmp_path: Path) -> None:
    front = search(tiny, tmp_path, until=("train", 0), minutes=0.01, candidates=1000)
    assert len(front) == 1
    written = load_recipe(tmp_path / "networks" / f"{place_name(front[0])}.yaml")  # of the two networks trained alone each has half
    assert written.training.minutes == pytest.approx(0.01 * 0.4 * 0.75 / 2) and written.training.steps > 1000


def test_restore_by_size(write_tiny: Any, tmp_path: Path) -> None:
    folders = {f"{name}": {"images": f"{name}/images"} for name in ("validation", "test")}
    tiny = write_tiny(tmp_path / "data", data=folders | {"degrade": {"noise": 25}, "masks": None, "classes": []}, task="restore")
    front = search(tiny, tmp_path / "search", until=("train", 0), objective="size", candidates=3)
    assert front and all(one.architecture.config.task == "restore" and one.score > 0 for one in front)


def test_finalist_with_ranks_and_bits(tiny: Any, tmp_path: Path) -> None:
    """They are trained by stages of compression; an interruption before the last one goes on."""
    recipe = load_recipe(tiny.recipe, ["compression.recover.share=0.5", "compression.quantize.share=0.5"])
    source = open_source(recipe.data, root=tiny.root)
    one = Architecture(config=base_config(recipe, source), rank_share=0.95, bits=4)
    arguments: dict[str, Any] = {"name": "001", "folder": tmp_path / "001", "root": tiny.root, "source": source}

    def stop(progress: FitProgress) -> None:
        if (tmp_path / "001" / "compressed" / "1-low-rank").exists():
            raise Stopped

    with pytest.raises(Stopped):
        train_finalist(recipe, one, report=stop, **arguments)
    finalist = train_finalist(recipe, one, **arguments)
    assert finalist is not None and 0 <= finalist.score <= 1
    assert [stage.name for stage in sorted((tmp_path / "001" / "compressed").iterdir())] == ["1-low-rank", "2-w4a8"]
    artifact = open_artifact(finalist.artifact)
    assert 4 in {record.bits for record in artifact.manifest.tensors.values()}


def point(number: int, score: float, cost: float = 1.0) -> StudyPoint:
    return StudyPoint(number=number, chosen={}, architecture=Architecture(config=ModelConfig()), score=score, cost=cost)


def test_spread_of_a_front() -> None:
    front = [point(n, 0.1 * n, n) for n in range(9)]
    assert [one.number for one in spread(front, 3)] == [0, 4, 8]
    assert [one.number for one in spread(front, 1)] == [8]
    assert spread(front[:2], 3) == front[:2]


def test_rank_correlation(tiny: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe)

    def network(shared: float | None, alone: float) -> Finalist:
        found = None if shared is None else point(0, shared)
        return Finalist(
            name="a", architecture=Architecture(config=ModelConfig()), point=found, run=tmp_path, artifact=tmp_path, recipe=recipe,
            float_score=alone, score=alone, bytes=1,
        )  # fmt: skip

    pairs = [(None, 0.0), (0.1, 0.5), (0.2, 0.6), (0.3, 0.55)]
    assert rank_correlation([network(*pair) for pair in pairs]) == pytest.approx(0.5)
    assert rank_correlation([network(*pair) for pair in pairs[:3]]) is None
