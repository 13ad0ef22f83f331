"""Whole searches up to the training of the best few, which `tests/cli/search` covers."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muntin.errors import MuntinError, RecipeError
from muntin.models import ModelConfig
from muntin.searching import (
    ArchitectureSearch,
    SearchSettings,
    Space,
    architecture_search,
    plan_search,
    search_architectures,
)
from muntin.searching.architecture_search import SearchStage, may_begin
from muntin.searching.cost import parameters_of
from muntin.searching.finalists import Finalist, rank_correlation, spread, unbeaten
from muntin.searching.plan import candidate_seconds
from muntin.searching.space import Architecture, UnbuildableError, parse_space
from muntin.searching.study import StudyPoint, pareto_front
from muntin.searching.trials import CandidateTrials, StoppedTrialError
from muntin.training import Recipe, load_recipe
from muntin.training.progress.report import FitProgress

SPACE = parse_space({"dims.0": [32, 48], "depths.0": [1, 2], "latents": [2, 4], "decoder": [8, 16]})


class Stopped(BaseException):
    """The end of a process."""


class Clock:
    """Seconds that a test sets: 10 for each candidate that was scored and for each network that was trained alone."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def search(
    tiny: Any, folder: Path, *, until: tuple[str, int], space: Space = SPACE, shown: list[SearchStage] | None = None, **settings: Any
) -> list[StudyPoint]:  # fmt: skip
    """Search until a stage has done so much; returns the front as it was last shown. `shown`: gets all stages."""
    front: list[StudyPoint] = []

    def report(stage: SearchStage) -> None:
        front[:] = stage.front
        if shown is not None:
            shown.append(stage)
        if (stage.stage, stage.done) == until:
            raise Stopped

    given = SearchSettings(**{"objective": "memory", "candidates": 8, "finalists": 1, **settings})
    with pytest.raises(Stopped):
        search_architectures(load_recipe(tiny.recipe), space, folder=folder, root=tiny.root, settings=given, report=report)
    return front


def test_killed_and_resumed_search(tiny: Any, tmp_path: Path) -> None:
    shown: list[SearchStage] = []
    whole = search(tiny, tmp_path / "whole", until=("train", 0), shown=shown)
    assert {", step 1 of 1", ", step 2 of 2"} <= {stage.text for stage in shown if stage.stage == "study"}  # of both rungs
    search(tiny, tmp_path / "parts", until=("study", 1))
    search(tiny, tmp_path / "parts", until=("study", 3))
    resumed = search(tiny, tmp_path / "parts", until=("train", 0))
    assert resumed == whole and whole
    more = search(tiny, tmp_path / "parts", until=("train", 0), candidates=11)
    assert json.loads((tmp_path / "parts" / "search.json").read_text())["first"]["candidates"] == 8
    assert pareto_front([*resumed, *more]) == more  # no point got lost
    with pytest.raises(RecipeError, match=r"with other settings \(settings\.candidates was 11, is 8\): give those again"):
        search(tiny, tmp_path / "parts", until=("train", 0))
    (tmp_path / "parts" / "search.json").write_text("{}")
    with pytest.raises(MuntinError, match="not the settings of a search"):
        search(tiny, tmp_path / "parts", until=("train", 0))


def searched(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[ArchitectureSearch, float]:
    """A search without trainings, and its seconds by a clock that adds 10 for each candidate and 20 for each network."""
    clock = Clock()

    def scored(self: CandidateTrials, one: Architecture, *given: Any) -> tuple[float, ...]:
        clock.seconds += 10
        return 0.0, parameters_of(one.config) / 1e9

    def train(recipe: Recipe, architecture: Architecture, **rest: Any) -> Finalist:
        clock.seconds += 20
        place = {"run": rest["folder"], "artifact": rest["folder"], "recipe": recipe}
        return Finalist(
            name=rest["name"], architecture=architecture, point=rest["point"], float_score=0.5, score=0.5, bytes=1, **place
        )  # fmt: skip

    monkeypatch.setattr(CandidateTrials, "score", scored)
    monkeypatch.setattr(architecture_search, "train_finalist", train)
    monkeypatch.setattr(architecture_search, "with_latencies", lambda networks, threads: networks)
    given = SearchSettings(**{"objective": "memory", "finalists": 2, **settings})
    result = search_architectures(load_recipe(tiny.recipe), SPACE, folder=folder, root=tiny.root, settings=given, clock=clock)
    return result, clock.seconds


def test_minutes_of_each_call(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study ends at 0.6 of the minutes, networks begin while one more fits, and the next call has all its minutes again."""
    first, seconds = searched(tiny, tmp_path, monkeypatch, candidates=16, minutes=1.0)
    assert seconds == 50 and len(first.points) == 3 and len(first.networks) == 1
    assert first.finished and first.out_of_time and any("not trained alone" in note for note in first.notes)
    assert first.networks[0].recipe.training.minutes == pytest.approx(0.4 * 0.75 / (min(2, len(first.front)) + 1))
    second, seconds = searched(tiny, tmp_path, monkeypatch, candidates=16, minutes=2.0)
    assert seconds <= 120 and len(second.points) > 3 and len(second.networks) > 1
    own = second.networks[0]
    assert own.recipe.training.minutes == pytest.approx(0.4 * 0.75 / (min(2, len(second.front)) + 1))  # sized by the first call
    short, seconds = searched(tiny, tmp_path / "short", monkeypatch, candidates=16, minutes=0.1)
    assert seconds == 10 and len(short.points) == 1 and short.out_of_time and not short.finished and not short.networks


def test_note_on_a_search_that_finds_the_own_model(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = searched(tiny, tmp_path, monkeypatch, candidates=1, minutes=9.0)
    assert "no network of the search is better than the recipe's own model at its cost: take the recipe's own model" in result.notes


def test_plan(tiny: Any, tmp_path: Path) -> None:
    """It writes nothing; with minutes lengths follow from these, without it measures steps; with candidates it has their time."""
    given: dict[str, Any] = {"folder": tmp_path / "search", "root": tiny.root}
    recipe, settings = load_recipe(tiny.recipe), SearchSettings(candidates=8, minutes=100.0)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_search(recipe, SPACE, settings=settings, **given)
    measured = plan_search(recipe, SPACE, settings=SearchSettings(candidates=8), **given)
    assert sorted(tmp_path.rglob("*")) == before
    assert plan.network_s == pytest.approx(6000 * 0.4 * 0.75 / 4) and plan.rough and not plan.too_short
    assert plan.first_s > plan.candidate_s > plan.network_s / 9 and measured.network_s > 0
    assert plan_search(recipe, SPACE, settings=SearchSettings(minutes=0.1), **given).too_short
    search(tiny, tmp_path / "search", until=("study", 3))
    later = plan_search(recipe, SPACE, settings=SearchSettings(objective="memory", candidates=8, finalists=1), **given)
    assert (later.scored, later.rough) == (3, False) and later.candidate_s > 0
    assert later.total_s == pytest.approx(later.study_s + 2 * (later.network_s + later.export_s))
    assert candidate_seconds(9.0, scored=1, study_s=0.0, deployed=False)[0] > 0  # a search that was killed before it noted the time


def test_timed_step(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the time between two steps, without the validation; Ctrl-C ends the search."""
    clock, stopped = Clock(), False

    def trained(*given: Any, progress: Any, **options: Any) -> Any:
        for clock.seconds in (100.0, 101.0, 103.0):
            progress(FitProgress(kind="step", step=1, steps=3))
        return SimpleNamespace(seconds=900.0, interrupted=False, stop_requested=stopped)

    monkeypatch.setattr(architecture_search, "fit", trained)
    monkeypatch.setattr(architecture_search.time, "perf_counter", clock)
    recipe = load_recipe(tiny.recipe)
    assert plan_search(recipe, SPACE, folder=tmp_path, root=tiny.root).network_s == 2 * recipe.training.steps
    stopped = True
    with pytest.raises(KeyboardInterrupt):
        plan_search(recipe, SPACE, folder=tmp_path, root=tiny.root)


@pytest.mark.parametrize("error", [StoppedTrialError("interrupted"), KeyboardInterrupt()])
def test_stopped_training_of_a_candidate(error: BaseException, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> tuple[float, ...]:
        raise error

    monkeypatch.setattr(CandidateTrials, "score", stop)
    given = SearchSettings(objective="memory", candidates=2, finalists=1)
    result = search_architectures(load_recipe(tiny.recipe), SPACE, folder=tmp_path / "search", root=tiny.root, settings=given)
    assert not result.finished and not result.out_of_time and result.points == ()


def test_candidates_that_all_fail(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> tuple[float, ...]:
        raise UnbuildableError("training: diverged")

    monkeypatch.setattr(CandidateTrials, "score", refuse)
    with pytest.raises(RecipeError, match="none of 2 proposals makes a network; the last one: training: diverged"):
        search(tiny, tmp_path, until=("train", 0), candidates=2)


def test_minutes_without_time_to_begin(tiny: Any, tmp_path: Path) -> None:
    given = SearchSettings(minutes=0.5)
    with pytest.raises(RecipeError, match=r"minutes 0\.5: the plan and the check of the data took .* minutes: give more"):
        search_architectures(
            load_recipe(tiny.recipe), SPACE, folder=tmp_path / "search", root=tiny.root, settings=given, clock=count(0, 60).__next__
        )
    assert not (tmp_path / "search").exists()


def test_later_networks_fit_in_the_time_left() -> None:
    assert may_begin(1.0, first=True, longest=0.0, training=9.0) and not may_begin(0.0, first=True, longest=0.0, training=0.0)
    assert not may_begin(9.0, first=False, longest=10.0, training=5.0) and may_begin(10.0, first=False, longest=10.0, training=5.0)
    assert not may_begin(4.0, first=False, longest=1.0, training=5.0)


def test_restore_by_size(write_tiny: Any, tmp_path: Path) -> None:
    folders = {f"{name}": {"images": f"{name}/images"} for name in ("validation", "test")}
    tiny = write_tiny(tmp_path / "data", data=folders | {"degrade": {"noise": 25}, "masks": None, "classes": []}, task="restore")
    front = search(tiny, tmp_path / "search", until=("train", 0), objective="size", candidates=3)
    assert front and all(one.architecture.config.task == "restore" and one.score > 0 for one in front)


def point(number: int, score: float, cost: float = 1.0) -> StudyPoint:
    return StudyPoint(number=number, chosen={}, architecture=Architecture(config=ModelConfig()), scores=(score,), cost=cost)


def test_spread_of_a_front() -> None:
    front = [point(n, 0.1 * n, n) for n in range(9)]
    assert [one.number for one in spread(front, 3)] == [0, 4, 8]
    assert [one.number for one in spread(front, 1)] == [8]
    assert spread(front[:2], 3) == front[:2]


def finalist(tiny: Any, found: StudyPoint | None, score: float, **values: Any) -> Finalist:
    fields: dict[str, Any] = {"architecture": Architecture(config=ModelConfig()), "bytes": 1, "ms": 1.0, **values}
    return Finalist(
        name="a", point=found, run=Path(), artifact=Path(), recipe=load_recipe(tiny.recipe), float_score=score, score=score, **fields
    )  # fmt: skip


@pytest.mark.parametrize(
    ("score", "ms", "noted"),
    [(0.705, 1.0, True), (0.711, 1.1, False), (0.75, 1.3, True), (0.695, 0.8, False), (0.68, 0.5, True), (0.75, 0.5, False)],
)
def test_note_on_networks_that_beat_no_preset(score: float, ms: float, noted: bool, tiny: Any) -> None:
    own = finalist(tiny, None, 0.7)
    other = finalist(tiny, point(1, 0.5), score, ms=ms, architecture=Architecture(config=ModelConfig(latents=8)))
    known = {own.architecture.key: "the preset hybrid-s"}
    notes = unbeaten([own, other], known, objective="latency")
    words = "no network of the search is better than the preset hybrid-s at its cost: take the preset hybrid-s"
    assert notes == ((words,) if noted else ())
    assert bool(unbeaten([own, other], known, objective="size")) == (score < 0.71)  # as many bytes
    assert not unbeaten([other], known, objective="latency")


def test_rank_correlation(tiny: Any) -> None:
    def network(shared: float | None, alone: float) -> Finalist:
        return finalist(tiny, None if shared is None else point(0, shared), alone)

    pairs = [(None, 0.0), (0.1, 0.5), (0.2, 0.6), (0.3, 0.55)]
    assert rank_correlation([network(*pair) for pair in pairs]) == pytest.approx(0.5)
    assert rank_correlation([network(*pair) for pair in pairs[:3]]) is None
