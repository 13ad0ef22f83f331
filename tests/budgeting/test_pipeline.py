"""Searches on a small network that reads drawn digits, with real artefacts."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from drawn_digits import Uniform
from model_helpers import answer, one_line
from muntin import Budget, load
from muntin.artifact import open_artifact
from muntin.budgeting import pipeline
from muntin.budgeting.forecast import Deadline
from muntin.budgeting.pipeline import compress, search_config
from muntin.budgeting.result import CompressionResult, SearchProgress
from muntin.compression import Change
from muntin.errors import MuntinError
from muntin.training.config import CompressionConfig

BUDGET = Budget(max_drop=0.02, confidence=None)


def run(digits: Any, uniform: Any, folder: Path | None, **arguments: Any) -> CompressionResult:
    recipe = {"widths": [1.0], "trials": 3, **arguments.pop("recipe", {})}
    values = {"evaluate": digits.evaluate, "budget": BUDGET, "folder": folder, "plans": uniform} | arguments
    return compress(digits.model, recipe=recipe, **{"calibration": digits.calibration, **values})


@pytest.fixture(scope="module")
def finished(digits: Any, uniform: Any, tmp_path_factory: pytest.TempPathFactory) -> CompressionResult:
    """A search to its end. Its folder is not to be changed: copy first."""
    return run(digits, uniform, tmp_path_factory.mktemp("search") / "search", holdout=digits.holdout)


@pytest.fixture
def begun(finished: CompressionResult, tmp_path: Path) -> Path:
    """The folder of a search that was killed after its reference."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "search"))
    shutil.rmtree(folder / "trials")
    for name in ("holdout.json", "state.json"):
        (folder / name).unlink()
    return folder


def plain(result: CompressionResult) -> list[dict[str, Any]]:
    """The rows without measurements of time and places."""
    return [{key: value for key, value in row.items() if key not in ("ms", "artifact", "bytes")} for row in result.rows]


def test_budget_is_kept(digits: Any, finished: CompressionResult) -> None:
    best = finished.best
    assert finished.kept and finished.outcome == "kept" and best is not None
    assert best.drop <= 0.02 and best.bytes == min(trial.bytes for trial in finished.trials if trial.accepted)
    assert finished.reference == pytest.approx(digits.evaluate(digits.model), abs=0.005) and finished.noise == 0
    assert finished.artifact.path == best.artifact and finished.artifact.bytes == best.bytes < finished.rows[0]["bytes"] / 3
    assert len({trial.within for trial in finished.trials}) == 2 and finished.trials[0].number == 0
    assert all(isinstance(change, Change) for change in finished.changes) and finished.changes
    assert {row["trial"]: row["score"] for row in finished.rows}[best.number] == best.score
    assert repr(finished) == f"<CompressionResult: kept, drop {best.drop:.4f}, at most 0.02, {best.bytes:,} bytes, {best.artifact}>"


@pytest.fixture(scope="module")
def sampled(digits: Any, uniform: Any, tmp_path_factory: pytest.TempPathFactory) -> CompressionResult:
    """FP32 and plain INT8, with a score for each sample. Calls with other terms may change the folder's state."""
    return run(digits, uniform, tmp_path_factory.mktemp("sampled") / "search", evaluate=digits.holdout, recipe={"trials": 0})


def test_kept_on_the_samples_but_not_with_certainty(digits: Any, uniform: Any, sampled: CompressionResult) -> None:
    budget = Budget(max_drop=max(2 * sampled.trials[0].drop, 1e-6), confidence=0.9999)
    again = run(digits, uniform, sampled.folder, evaluate=digits.holdout, budget=budget, recipe={"trials": 0})
    assert again.kept and again.outcome == "uncertain" == again.rows[1]["verdict"] and again.rows[1]["bound"] > budget.max_drop
    assert any("INT8 keeps the budget on the samples of evaluate, but not with a certainty of 0.9999" in note for note in again.notes)


def test_plain_int8_comes_first(digits: Any, uniform: Any, finished: CompressionResult) -> None:
    first = finished.trials[0]
    layers = open_artifact(first.artifact).manifest.layers
    assert (
        len(layers) == 4
        and all(layer.activation_bits == layer.weight_bits == 8 for layer in layers)
        and finished.rows[0]["trial"] is None
        and finished.rows[1]["trial"] == 0
    )
    assert first.plan == Uniform().int8() and finished.rows[0]["bytes"] / first.bytes > 2


def test_other_budget_is_judged_without_training(digits: Any, uniform: Any, finished: CompressionResult, tmp_path: Path) -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError("called")

    folder = Path(shutil.copytree(finished.folder, tmp_path / "search"))
    (folder / "state.json").write_text(json.dumps({"terms": {"max_drop": 0.02, "confidence": None}, "ended": True}))
    budget = Budget(max_drop=1.0)
    judged = run(digits, uniform, folder, evaluate=never, budget=budget)
    assert all(trial.within for trial in judged.trials) and judged.best is not None
    assert judged.best.bytes == min(trial.bytes for trial in finished.trials)
    assert any("judged again by this budget" in note for note in judged.notes)
    assert not any("judged again" in note for note in run(digits, uniform, folder, budget=budget, recipe={"trials": 4}).notes)


def test_result_runs(digits: Any, finished: CompressionResult) -> None:
    images = digits.test[0][:64]
    session = load(finished.artifact.path)
    scores = torch.from_numpy(session(images.permute(0, 2, 3, 1).to(torch.uint8).numpy()))
    same = scores.argmax(1) == answer(finished.model, images).argmax(1)
    assert same.float().mean() > 0.95


def test_figures_of_holdout(digits: Any, finished: CompressionResult) -> None:
    figures = finished.holdout
    assert figures is not None and figures.interval is not None and figures.samples == 400
    assert figures.interval[0] <= figures.drop <= figures.interval[1]
    assert figures.drop == pytest.approx(figures.reference - figures.score)
    assert figures.reference == pytest.approx(sum(digits.holdout(digits.model)) / 400, abs=0.005)


def test_finished_search_measures_nothing(digits: Any, uniform: Any, finished: CompressionResult) -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError("called")

    again = run(digits, uniform, finished.folder, evaluate=never, holdout=never)
    assert again.rows == finished.rows and again.holdout == finished.holdout and again.notes == finished.notes
    assert torch.equal(answer(again.model, digits.test[0]), answer(finished.model, digits.test[0]))


def test_killed_and_resumed(digits: Any, uniform: Any, finished: CompressionResult, begun: Path) -> None:
    calls = 0

    def killed(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return float(digits.evaluate(model))

    with pytest.raises(KeyboardInterrupt):
        run(digits, uniform, begun, evaluate=killed)
    assert sorted(path.name for path in (begun / "trials").iterdir()) == [".001.partial", "000"]
    resumed = run(digits, uniform, begun, holdout=digits.holdout)
    assert plain(resumed) == plain(finished) and resumed.holdout == finished.holdout
    assert torch.equal(answer(resumed.model, digits.test[0]), answer(finished.model, digits.test[0]))
    assert sorted(path.name for path in (begun / "trials").iterdir()) == [
        path.name for path in sorted((finished.folder / "trials").iterdir())
    ]


@pytest.mark.parametrize(("value", "words"), [(ValueError("no such column"), "evaluate raised ValueError on INT8: no such column"),
                                              (float("nan"), "evaluate returned nan for INT8")])  # fmt: skip
def test_trial_that_cannot_be_scored(digits: Any, uniform: Any, begun: Path, value: Any, words: str) -> None:
    calls = 0

    def evaluate(model: nn.Module) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return digits.evaluate(model)
        if isinstance(value, Exception):
            raise value
        return value

    result = run(digits, uniform, begun, evaluate=evaluate, recipe={"trials": 1})
    assert [trial.verdict == "failed" for trial in result.trials] == [True, False] and result.best is result.trials[1]
    assert result.rows[1]["failed"].startswith(words) and result.rows[1]["score"] is None
    assert any(note.startswith(f"INT8 failed: {words}") for note in result.notes)


def test_trials_that_all_fail(digits: Any, uniform: Any, begun: Path) -> None:
    result = run(digits, uniform, begun, evaluate=lambda model: float("nan"), recipe={"trials": 9})
    assert (result.kept, result.outcome, result.best) == (False, "not tried", None) and len(result.trials) == 4
    assert any(note.startswith("the search ended after 3 failed trials in a row") for note in result.notes)


def test_evaluate_that_fails_in_a_folder_of_the_search(digits: Any, uniform: Any) -> None:
    with pytest.raises(MuntinError) as error:
        run(digits, uniform, None, evaluate=lambda model: 1 / 0)
    place = Path(one_line(error).partition("kept in ")[2].partition(": a second run")[0])
    assert place.is_absolute() and (place / "settings.json").is_file()
    shutil.rmtree(place)


def test_other_settings(digits: Any, uniform: Any, begun: Path) -> None:
    with pytest.raises(MuntinError) as error:
        run(digits, uniform, begun, seed=1)
    assert "other settings (seed 0, not 1)" in one_line(error)


def test_no_minutes(digits: Any, uniform: Any, begun: Path) -> None:
    result = run(digits, uniform, begun, recipe={"minutes": 0}, holdout=digits.holdout)
    assert (result.kept, result.outcome, result.best, result.holdout) == (False, "not tried", None, None)
    assert result.artifact.path == begun / "reference" / "artifact" and len(result.rows) == 1
    assert "nothing was tried: minutes is 0" in result.notes


def test_too_few_minutes(digits: Any, uniform: Any, begun: Path) -> None:
    result = run(digits, uniform, begun, recipe={"minutes": 1e-6})
    words = "stopped at the limit of 1e-06 min before a candidate beyond plain INT8 was tried: the same call goes on where it ended"
    assert result.outcome == "not tried" and words in result.notes
    assert run(digits, uniform, begun).kept  # minutes of an earlier call do not count


def test_first_trial_that_would_take_too_long(digits: Any, uniform: Any, begun: Path, tmp_path: Path) -> None:
    training = {"finetune": digits.train[:1], "step_seconds": 60.0, "recipe": {"minutes": 9, "steps": 10}}
    result = run(digits, uniform, tmp_path / "slow", **training)
    assert [trial.number for trial in result.trials] == [0]
    assert "take most of the 9 minutes, its training about 20;" in result.notes[-1]
    assert not (tmp_path / "slow" / "tables").exists()


def test_training_that_takes_too_long(digits: Any, uniform: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit passes in the third step of the training of the first trial."""
    now = [0.0]
    monkeypatch.setattr(pipeline, "Deadline", partial(Deadline, clock=lambda: now[0]))

    def report(progress: SearchProgress) -> None:
        if progress.stage == "train" and progress.step == 3:
            now[0] = 600.0

    training = {"finetune": [x for x, _ in digits.train[:5]], "progress": report}
    folder = tmp_path / "slow"
    result = run(digits, uniform, folder, recipe={"minutes": 9}, **training)
    assert [trial.number for trial in result.trials] == [0] and [path.name for path in (folder / "trials").glob("0*")] == ["000"]
    assert [trial.number for trial in run(digits, uniform, folder, recipe={"trials": 1}, **training).trials] == [0, 1]


def test_tables_that_would_take_too_long(digits: Any, uniform: Any, tmp_path: Path) -> None:
    folder, widths = tmp_path / "slow", [1.0, 0.8]
    first = run(digits, uniform, folder, evaluate=digits.evaluate, recipe={"widths": widths, "trials": 1})
    base = folder / "tables" / "1" / "base.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"seconds": 6000.0}))
    result = run(digits, uniform, folder, recipe={"widths": widths, "trials": 9, "minutes": 99})
    assert result.trials[:2] == first.trials and {trial.plan.width for trial in result.trials} == {1.0}
    assert [path.name for path in (folder / "tables").iterdir()] == ["1"]
    assert any(note.startswith("stopped at the limit of 99 min: ") for note in result.notes)


def test_noisy_evaluate(digits: Any, uniform: Any, tmp_path: Path) -> None:
    scores = chain([0.9, 0.8], repeat(0.9))
    result = run(digits, uniform, tmp_path / "noisy", evaluate=lambda model: next(scores), recipe={"trials": 0})
    assert result.noise == pytest.approx(0.1) and result.reference == 0.9
    assert result.notes[0].startswith("evaluate is noisy: two calls on the FP32 model differ by 0.1, more than half of max_drop 0.02")


def test_impossible_budget(digits: Any, begun: Path) -> None:
    class Two(Uniform):
        FORMS = Uniform.FORMS[:2]

    scores, seen = iter([0.5, 0.6]), list[SearchProgress]()
    result = run(digits, lambda *given: Two(), begun, evaluate=lambda model: next(scores), holdout=lambda model: 0.5, progress=seen.append)
    assert not result.kept and result.outcome == "not reachable" and result.best is not None
    assert result.best.score == 0.6 and result.artifact.path == result.best.artifact and len(result.trials) == 2
    assert any("the least harmful plan loses more, too" in note for note in result.notes)
    assert any("return a score for each sample" in note for note in result.notes)
    assert result.holdout is not None and result.holdout.interval is None
    assert [progress.stage for progress in seen] == ["plan", "reference", "trial", "tables", "trial", "holdout"]
    assert len(seen[-1].trials) == 2 and seen[0].forecast is not None and "at most 3 trials without training" in seen[0].forecast.text


def test_one_number_has_no_margin(digits: Any, uniform: Any, begun: Path, tmp_path: Path) -> None:
    def mean(model: nn.Module) -> float:
        return float(torch.as_tensor(digits.evaluate(model)).mean())

    result = run(digits, uniform, tmp_path / "new", evaluate=mean, budget=Budget(max_drop=0.02), recipe={"trials": 1})
    assert any("without a margin" in note for note in result.notes) and result.trials[0].bound == result.trials[0].drop


def test_margin_for_unseen_data(digits: Any, uniform: Any, sampled: CompressionResult) -> None:
    seen = list[SearchProgress]()
    result = run(digits, uniform, sampled.folder, budget=Budget(max_drop=0.001), recipe={"trials": 0}, progress=seen.append)
    assert all(trial.bound > trial.drop for trial in result.trials)
    (note,) = (progress.note for progress in seen if progress.note)
    assert note in result.notes and note.startswith("400 samples certify no drop below 0.0041 (95 % certainty); for 0.001 give at least")


def test_settings_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("compression: {trials: 5, widths: [1, 0.5]}\n")
    assert search_config(tmp_path / "search.yaml") == CompressionConfig(trials=5, widths=(1, 0.5))
    assert search_config(None) == CompressionConfig() and search_config({"minutes": 3}).minutes == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.01}, "give muntin.Budget"),
        ({"recipe": {"trials": -1}}, "compression.trials: Input should be greater than or equal to 0"),
        ({"recipe": {"minutes": float("nan")}}, "compression.minutes"),
        ({"recipe": {"widths": [0.5]}}, "the first of them 1"),
        ({"recipe": {"steps": 5}}, "finetune has no data"),
        ({"finetune": (x for x in ())}, "finetune has no length: give steps"),
        ({"mean": 0.5, "std": 0.5, "calibration": [torch.rand(2, 1, 16, 16)]}, "multiply by 255"),
        ({"recipe": {"trails": 5}}, "did you mean 'trials'?"),
    ],
)
def test_refused_arguments(digits: Any, uniform: Any, tmp_path: Path, arguments: Any, words: str) -> None:
    with pytest.raises(MuntinError) as error:
        run(digits, uniform, tmp_path / "refused", **arguments)
    assert words in one_line(error) and not (tmp_path / "refused").exists()


def test_budget_that_16_bits_would_spend(digits: Any, uniform: Any) -> None:
    """Where float layers in 16 bits lose too much, the artefacts are recorded in 32 bits."""
    images = digits.test[0]
    exact = answer(digits.model, images)

    def closeness(model: nn.Module) -> float:
        return -float((answer(model, images) - exact).square().mean().sqrt())

    result = run(digits, uniform, None, evaluate=closeness, budget=Budget(max_drop=5e-3, confidence=None), recipe={"trials": 1})
    reference = open_artifact(result.folder / "reference" / "artifact")
    if reference.manifest.precision == "f32":
        pytest.skip("this machine has no products of 16 bits")
    note = next(note for note in result.notes if note.startswith("float layers run in 32 bits: in 16 the FP32 model alone loses"))
    with closing(load(reference.path)) as session:
        narrow = session(images.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    assert f"{float(np.sqrt(np.square(narrow - exact.numpy()).mean())):.4g}," in note
    assert result.artifact.manifest.precision == "f32"
    usual = run(digits, uniform, None, recipe={"trials": 1})
    assert usual.artifact.manifest.precision == reference.manifest.precision and not any("32 bits" in note for note in usual.notes)
