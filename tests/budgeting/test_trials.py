from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import one_line
from muntin.budgeting.forms.plans import Form, Plan
from muntin.budgeting.scores import Score
from muntin.budgeting.trials import Trial, TrialFolder, batches_digest, measured_trials, plan_of
from muntin.errors import MuntinError

SETTINGS = {"model": "abc", "seed": 0}
PLAN = Plan(width=0.8, forms={"a": Form(8, 4), "b": Form(None, 16)}, harm=0.5, cost=100.0)
MEASURED = {"bytes": 120, "ms": 1.5, "seconds": 2.0}
SCORE = Score.of(np.array([1.0, 0.0, 1.0]))


def make(part: Path) -> tuple[dict[str, Any], Score]:
    (part / "artifact").mkdir()
    return MEASURED, SCORE


def never(part: Path) -> Any:
    raise AssertionError("measured again")


def judge(score: Score) -> dict[str, Any]:
    return {"drop": 1 - score.value, "bound": 0.5, "verdict": "uncertain", "accepted": False}


def test_trial_is_measured_once(tmp_path: Path) -> None:
    trial = TrialFolder(tmp_path, SETTINGS).trial(1, PLAN, 0.7, make, judge)
    assert TrialFolder(tmp_path, SETTINGS).trial(1, PLAN, 0.7, never, judge) == trial
    judged = {"score": SCORE.value, **judge(SCORE)}
    assert trial == Trial(number=1, plan=PLAN, limit=0.7, folder=tmp_path / "trials" / "001", **MEASURED, **judged)  # type: ignore[arg-type]
    assert trial.artifact.is_dir() and trial.within and (trial.cost("size"), trial.cost("latency")) == (120, 1.5)
    assert plan_of(json.loads((trial.folder / "trial.json").read_text())) == PLAN


def test_trial_is_judged_again(tmp_path: Path) -> None:
    def seen(score: Score) -> dict[str, Any]:
        assert score.samples is not None and score.samples.tolist() == [1.0, 0.0, 1.0]
        return {"drop": 0.0, "bound": 0.0, "verdict": "kept", "accepted": True}

    folder = TrialFolder(tmp_path, SETTINGS)
    folder.trial(2, PLAN, 0.7, make, judge)
    assert [(trial.number, trial.verdict) for trial in folder.trials(seen)] == [(2, "kept")] and measured_trials(tmp_path) == 1


def test_failed_trial_is_recorded(tmp_path: Path) -> None:
    def failing(part: Path) -> Any:
        raise ValueError("no\nsuch kernel")

    folder = TrialFolder(tmp_path, SETTINGS)
    trial = folder.trial(1, PLAN, 0.7, failing, judge)
    assert (trial.failed, trial.verdict, trial.within, trial.plan) == ("ValueError: no such kernel", "failed", False, PLAN)
    assert folder.trials(judge) == [trial]


def test_full_disk_is_no_failed_trial(tmp_path: Path) -> None:
    def full(part: Path) -> Any:
        raise MuntinError("cannot be written") from OSError(28, "No space left on device")

    folder = TrialFolder(tmp_path, SETTINGS)
    with pytest.raises(MuntinError, match="cannot be written"):
        folder.trial(1, PLAN, 0.7, full, judge)
    assert folder.trials(judge) == []


def test_killed_trial_leaves_no_record(tmp_path: Path) -> None:
    def killed(part: Path) -> Any:
        make(part)
        raise KeyboardInterrupt

    folder = TrialFolder(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        folder.trial(1, PLAN, 0.7, killed, judge)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [".001.partial"]
    folder.trial(1, PLAN, 0.7, make, judge)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["001"]


def test_terms_of_calls(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, SETTINGS)
    one, other = {"max_drop": 0.01}, {"max_drop": 0.02}
    assert [folder.begin(terms) for terms in (one, other, one)] == [False] * 3
    folder.end()
    assert [folder.begin(terms) for terms in (one, other, other)] == [False, True, False]


def test_tables_go_on_after_an_interruption(tmp_path: Path) -> None:
    def killed(place: Path) -> dict[str, Any]:
        (place / "tables.csv").write_text("harm")
        raise KeyboardInterrupt

    def rest(place: Path) -> dict[str, Any]:
        assert (place / "tables.csv").read_text() == "harm"
        return {"seconds": 1.0}

    folder = TrialFolder(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        folder.base(0.8, killed)
    assert folder.base(0.8, rest) == folder.base(0.8, never) == (tmp_path / "tables" / "0.8", {"seconds": 1.0})


def test_other_settings(tmp_path: Path) -> None:
    TrialFolder(tmp_path, SETTINGS)
    with pytest.raises(MuntinError) as error:
        TrialFolder(tmp_path, {**SETTINGS, "seed": 1})
    assert "other settings (seed 0, not 1): give another folder" in one_line(error)


def test_folder_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"model": "abc", "seed": 0, "max_drop": 0.01}')
    with pytest.raises(MuntinError, match="another version of muntin"):
        TrialFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_record(tmp_path: Path, text: str) -> None:
    folder = TrialFolder(tmp_path, SETTINGS)
    trial = folder.trial(1, PLAN, 0.7, make, judge)
    (trial.folder / "trial.json").write_text(text)
    with pytest.raises(MuntinError) as error:
        folder.trial(1, PLAN, 0.7, never, judge)
    assert "remove its folder, and it is measured again" in one_line(error)


def test_holdout_is_called_once_each(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, SETTINGS)
    for number, score in ((None, 0.9), (2, 0.8), (3, 0.7)):
        assert folder.holdout(number, lambda score=score: {"score": score}) == {"score": score}  # type: ignore[misc]
        assert folder.holdout(number, lambda: never(tmp_path)) == {"score": score}
    assert folder.held_out == 2


def test_digest_of_batches() -> None:
    batches = [{"ids": torch.tensor([[1, 2]])}, (torch.ones(2), torch.zeros(1))]
    assert batches_digest(batches) == batches_digest(batches) != batches_digest(batches[:1])
