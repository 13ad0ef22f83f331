"""Studies: killed and resumed, refused choices, architectures that come again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muntin.errors import DataError
from muntin.models import ModelConfig
from muntin.searching.cost import layer_macs, parameters_of
from muntin.searching.space import Architecture, Space, UnbuildableError, parse_space
from muntin.searching.study import JOURNAL, ArchitectureStudy


class Killed(BaseException):
    """The end of a process."""


def judge(one: Architecture) -> tuple[list[float], float]:
    return [1 - 1 / parameters_of(one.config)], layer_macs(one.config)


def kill(one: Architecture) -> tuple[list[float], float]:
    raise Killed


def proposals(study: ArchitectureStudy) -> list[Any]:
    return [(trial.params, trial.values) for trial in study.proposals]


def test_killed_and_resumed_study(space: Space, base: ModelConfig, tmp_path: Path) -> None:
    whole = ArchitectureStudy(space, base, tmp_path / "whole")
    for _ in range(30):
        whole.step(judge)
    first = ArchitectureStudy(space, base, tmp_path / "parts")
    while len(first.proposals) < 12:
        first.step(judge)
    with pytest.raises(Killed):
        while True:  # choices that make no network are not judged
            first.step(kill)
    with (tmp_path / "parts" / JOURNAL).open("ab") as file:
        file.write(b'{"half a line')
    (tmp_path / "parts" / f"{JOURNAL}.lock").symlink_to("a process")
    second = ArchitectureStudy(space, base, tmp_path / "parts")
    while len(second.proposals) < 30:
        second.step(judge)
    assert proposals(second) == proposals(whole)
    assert [point.architecture for point in second.front] == [point.architecture for point in whole.front]
    assert any(trial.values is None for trial in whole.proposals)  # a stem of two stages with two pairs


def test_front_and_importances(base: ModelConfig, tmp_path: Path) -> None:
    space = parse_space({"depths.0": [1, 2, 3, 4], "latents": [2, 4], "decoder": [8, 16]})
    study, judged = ArchitectureStudy(space, base, tmp_path), list[str]()

    def count(one: Architecture) -> tuple[list[float], float]:
        judged.append(one.key)
        return judge(one)

    assert study.importances() == {}
    for _ in range(40):
        study.step(count)
    assert len(judged) == len(set(judged)) == len(study.points) <= 16  # each once
    front = study.front
    assert [point.cost for point in front] == sorted(point.cost for point in front)
    assert [point.score for point in front] == sorted(point.score for point in front)
    best = max(study.points, key=lambda point: point.score)
    assert front[-1].score == best.score
    if importances := study.importances():
        assert sum(importances["score"].values()) == pytest.approx(1)


def test_importances_of_the_first_rung(base: ModelConfig, tmp_path: Path) -> None:
    space = parse_space({"depths.0": [1, 2, 3, 4], "latents": [2, 4], "decoder": [8, 16, 24]})
    found = []
    for later in ([], [0.5]):
        study = ArchitectureStudy(space, base, tmp_path / str(len(later)), sampler="random")
        for _ in range(40):
            study.step(lambda one, later=later: ([judge(one)[0][0], *later], judge(one)[1]))  # type: ignore[misc]
        found.append(study.importances())
    assert found[0] == found[1] != {}


def test_refused_architecture_that_comes_again(base: ModelConfig, tmp_path: Path) -> None:
    judged = []

    def refuse(one: Architecture) -> tuple[list[float], float]:
        judged.append(one.key)
        raise UnbuildableError("training: diverged")

    study = ArchitectureStudy(parse_space({"latents": [2, 4]}), base, tmp_path)
    for _ in range(5):
        assert study.step(refuse) is None
    assert len(judged) == len(set(judged)) <= 2 and len(study.proposals) == 5 and study.refusal == "training: diverged"


def test_first_proposals_and_the_last_rung(base: ModelConfig, tmp_path: Path) -> None:
    space = parse_space({"depths.0": [1, 2, 3], "latents": [2, 4]})
    other = ModelConfig.model_validate({**base.model_dump(), "depths": (3, 1)})
    outside = ModelConfig.model_validate({**base.model_dump(), "depths": (4, 1)})
    study = ArchitectureStudy(space, base, tmp_path, begin=[base, outside, other, base], rungs=2)
    with pytest.raises(Killed):
        study.step(kill)
    study.study.enqueue_trial({"depths.0": "3", "latents": "2"})  # killed before it was asked
    study = ArchitectureStudy(space, base, tmp_path, begin=[base, outside, other, base], rungs=2)
    first = study.step(judge)
    assert first is not None and first.architecture.config == base and study.front == []  # not of the last rung
    second = study.step(lambda one: ([0.4, 0.5], 1.0))
    assert second is not None and second.architecture.config == other and study.front == [second]
    for _ in range(8):
        study.step(judge)
    assert {point.architecture.config.depths[0] for point in study.points} <= {1, 2, 3}


def test_random_sampler_differs_by_seed(space: Space, base: ModelConfig, tmp_path: Path) -> None:
    studies = [ArchitectureStudy(space, base, tmp_path / str(n), seed=n, sampler="random") for n in range(2)]
    for study in studies:
        for _ in range(4):
            study.step(judge)
    assert proposals(studies[0]) != proposals(studies[1])


def test_journal_of_something_else(space: Space, base: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("no journal\n")
    with pytest.raises(DataError, match="not the journal of a study"):
        ArchitectureStudy(space, base, tmp_path)
