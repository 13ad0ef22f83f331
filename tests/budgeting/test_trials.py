from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model_helpers import one_line
from muntin.budgeting.forms import Form, Plan
from muntin.budgeting.trials import Trial, TrialFolder, batches_digest, plan_of
from muntin.errors import MuntinError

SETTINGS = {"model": "abc", "max_drop": 0.01, "seed": 0}
PLAN = Plan(width=0.8, forms={"a": Form(8, 4), "b": Form(None, 16)}, harm=0.5, cost=100.0)
MEASURED = {"score": 0.9, "drop": 0.1, "bound": 0.1, "bytes": 120, "ms": 1.5, "kept": False, "seconds": 2.0}


def make(part: Path) -> dict[str, Any]:
    (part / "artifact").mkdir()
    return MEASURED


def never(part: Path) -> dict[str, Any]:
    raise AssertionError("measured again")


def test_trial_is_measured_once(tmp_path: Path) -> None:
    trial = TrialFolder(tmp_path, SETTINGS).trial(1, PLAN, 0.7, make)
    assert TrialFolder(tmp_path, SETTINGS).trial(1, PLAN, 0.7, never) == trial
    assert trial == Trial(number=1, plan=PLAN, limit=0.7, folder=tmp_path / "trials" / "001", **MEASURED)  # type: ignore[arg-type]
    assert trial.artifact.is_dir() and (trial.cost("size"), trial.cost("latency")) == (120, 1.5)
    assert plan_of(json.loads((trial.folder / "trial.json").read_text())) == PLAN


def test_killed_trial_leaves_no_record(tmp_path: Path) -> None:
    def killed(part: Path) -> dict[str, Any]:
        make(part)
        raise KeyboardInterrupt

    folder = TrialFolder(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        folder.trial(1, PLAN, 0.7, killed)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [".001.partial"]
    folder.trial(1, PLAN, 0.7, make)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["001"]


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
        TrialFolder(tmp_path, {**SETTINGS, "max_drop": 0.02})
    assert "other settings (max_drop 0.01, not 0.02): give another folder" in one_line(error)


def test_other_plan(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, SETTINGS)
    folder.trial(1, PLAN, 0.7, make)
    other = Plan(width=0.8, forms={"a": Form(None, 8), "b": Form(None, 16)})
    assert folder.trial(1, other, 0.9, never).plan == PLAN  # the one that was measured
    with pytest.raises(MuntinError, match="of another plan"):
        folder.trial(1, Plan(width=1.0, forms=PLAN.forms), 0.7, never)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_record(tmp_path: Path, text: str) -> None:
    folder = TrialFolder(tmp_path, SETTINGS)
    trial = folder.trial(1, PLAN, 0.7, make)
    (trial.folder / "trial.json").write_text(text)
    with pytest.raises(MuntinError) as error:
        folder.trial(1, PLAN, 0.7, never)
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
