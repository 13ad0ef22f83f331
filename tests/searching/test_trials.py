"""Short trainings of candidates in rungs, and the cost of the deployed network."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muntin.data import open_source
from muntin.errors import ArtifactError, MuntinError, VerificationError
from muntin.searching import trials
from muntin.searching.preparation import base_config
from muntin.searching.space import Architecture, UnbuildableError
from muntin.searching.trials import CandidateTrials, StoppedTrialError, goes_on, shorter
from muntin.training import load_recipe
from muntin.training.progress.report import FitProgress


class Stopped(BaseException):
    """The end of a process."""


def trials_of(tiny: Any, folder: Path, *changes: str, **options: Any) -> tuple[CandidateTrials, Architecture]:
    recipe = load_recipe(tiny.recipe, ["training.steps=18", "model.options.dims=[32]", "model.options.depths=[1]", *changes])
    source = open_source(recipe.data, task=recipe.task, root=tiny.root)
    base = base_config(recipe, source)
    given = {"folder": folder, "root": tiny.root, "objective": "size", **options}
    return CandidateTrials(recipe, base, source, **given), Architecture(config=base)


def test_rungs_of_a_candidate(tiny: Any, tmp_path: Path) -> None:
    """It is trained in each rung that it comes to, goes on after a kill, and leaves nothing."""
    tried, one = trials_of(tiny, tmp_path)
    steps: list[tuple[int, int]] = []

    def report(progress: FitProgress) -> None:
        assert progress.kind != "check"  # the search has checked the data
        if progress.kind == "step":
            steps.append((progress.step, progress.steps))

    def kill(progress: FitProgress) -> None:
        report(progress)
        if progress.kind == "step" and progress.steps == 6 and progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        tried.score(one, 1.0, [[], []], kill)
    scores = tried.score(one, 1.0, [[], []], report)
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    assert {length for _, length in steps} == {2, 6} and steps.count((2, 2)) == 1  # the first rung is not trained again
    assert [path.name for path in (tmp_path / "trials").iterdir()] == []
    better = [(1.1, 0.5), (1.2, 0.4), (1.3, 0.3), (1.4, 0.2)]
    assert len(tried.score(one, 1.0, [better, []])) == 1


def test_interrupted_training(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, one = trials_of(tiny, tmp_path)
    fit = trials.fit
    monkeypatch.setattr(trials, "fit", lambda *given, **options: replace(fit(*given, **options), stop_requested=True))
    with pytest.raises(StoppedTrialError):
        tried.score(one, 1.0, [[], []])


def test_failed_training(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate is refused and leaves nothing; the recipe's own network ends the search."""
    tried, one = trials_of(tiny, tmp_path)

    def diverge(recipe: Any, *, directory: Path, **options: Any) -> None:
        directory.mkdir(parents=True)
        raise MuntinError("the loss is not finite")

    monkeypatch.setattr(trials, "fit", diverge)
    with pytest.raises(UnbuildableError, match="training: the loss is not finite"):
        tried.score(replace(one, config=one.config.model_copy(update={"depths": (2,)})), 1.0, [[], []])
    assert not list((tmp_path / "trials").iterdir())
    with pytest.raises(MuntinError, match=r"^the loss is not finite"):
        tried.score(one, 1.0, [[], []])


def test_failed_deployment(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trials" / "a.untrained").mkdir(parents=True)
    tried, one = trials_of(tiny, tmp_path, "quantization.min_sqnr_db=3", objective="latency", reference_ms=7.0)
    assert not (tmp_path / "trials" / "a.untrained").exists()
    fails, exported = "reference", list[str]()

    def export(model: Any, example: Any, place: Path, **options: Any) -> None:
        exported.append(place.suffix or place.name)
        assert options["quantization"].min_sqnr_db == 3  # as finalists
        if fails in str(place):
            raise ArtifactError("no")

    def open_session(place: Path, options: Any) -> Any:
        assert not options.cache
        if fails == "session" and place.name != "reference":
            raise VerificationError("altered")
        return SimpleNamespace(close=list)

    monkeypatch.setattr(trials, "export", export)
    monkeypatch.setattr(trials, "open_image_session", open_session)
    with pytest.raises(ArtifactError, match=r"^no"):  # no fault of the candidate
        tried.cost(one)
    fails = "untrained"
    with pytest.raises(UnbuildableError, match="cannot be deployed: no"):
        tried.cost(one)
    fails = "session"
    with pytest.raises(UnbuildableError, match="cannot be deployed: altered"):
        tried.cost(one)
    assert exported == ["reference", "reference", ".untrained", ".untrained"]  # once after it succeeded


def test_costs(tiny: Any, tmp_path: Path) -> None:
    """Latency is that of the deployed network, in units of the recipe's own one; size and memory follow from shapes."""
    tried, one = trials_of(tiny, tmp_path, objective="latency", reference_ms=7.0)
    assert tried.cost(one) == pytest.approx(7.0, rel=0.9)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["reference"]
    assert tried.reference_ms == 7.0
    first, _ = trials_of(tiny, tmp_path, objective="latency")
    assert first.cost(one) > 0 and first.reference_ms > 0
    small, _ = trials_of(tiny, tmp_path)
    memory, _ = trials_of(tiny, tmp_path, objective="memory")
    assert 0 < small.cost(one) < memory.cost(one)


def test_best_third_by_fronts() -> None:
    assert goes_on((0.1, 9.0), [])
    line = [(0.1 * n, float(n)) for n in range(9)]  # one front: nothing is beaten, all of it is kept
    assert all(goes_on(one, [other for other in line if other != one]) for one in line)
    chain = [(0.1 * n, float(-n)) for n in range(9)]  # each beats those before it
    assert [goes_on(one, [other for other in chain if other != one]) for one in chain] == [False] * 6 + [True] * 3
    generator = random.Random(0)  # noqa: S311 - no secret
    cloud = [(generator.random(), generator.random()) for _ in range(300)]
    kept = sum(goes_on(one, [other for other in cloud if other is not one]) for one in cloud)
    assert 100 <= kept < 130


def test_length_of_a_rung(tiny: Any) -> None:
    recipe = load_recipe(tiny.recipe, ["training.steps=20", "training.minutes=6"])
    assert (shorter(recipe, 9).training.steps, shorter(recipe, 3).training.minutes) == (2, 2.0)
    assert shorter(load_recipe(tiny.recipe), 9).training.steps == 1
