"""The result of a run has the best averaged weights; patience ends a run; both survive an interruption."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_helpers import assert_same_state
from muntin.compression import load_model
from muntin.data import open_source
from muntin.data.source import SPLITS
from muntin.errors import RecipeError
from muntin.models import TorchSession
from muntin.training.checkpoint import read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE, BEST
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.fitting import FitResult, broken_off, fit
from muntin.training.progress.best import best_point, out_of_patience
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import load_recipe

# The rate rises over the whole run, up to one that ruins the weights: the best validation is an early one.
PLAN = ("training.steps=12", "training.validate_every=2", "training.warmup=0.99", "training.learning_rate=1", "training.average=0.5",
        "training.checkpoint_every=1000", "training.clip=100", "training.spike=null", "training.precision=fp32")  # fmt: skip


def train(tiny: Any, directory: Path, *overrides: str, **arguments: Any) -> FitResult:
    return fit(load_recipe(tiny.recipe, (*PLAN, *overrides)), root=tiny.root, directory=directory, **arguments)


def interrupted_at(step: int) -> Callable[[FitProgress], None]:
    def report(progress: FitProgress) -> None:
        if progress.kind == "step" and progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> tuple[Any, FitResult]:
    root = tmp_path_factory.mktemp("best")
    tiny = write_tiny(root / "data")
    return tiny, train(tiny, root / "run")


def test_result_has_the_best_score(whole: tuple[Any, FitResult]) -> None:
    tiny, result = whole
    checkpoint = read_checkpoint(result.checkpoint)
    best = best_point(result.validation)
    assert best is not None and best["step"] < 12  # otherwise the plan shows nothing
    assert checkpoint.state.averaged_at == best["step"] and result.result == checkpoint.state.result == best
    source = open_source(checkpoint.recipe.data, task=checkpoint.recipe.task, root=tiny.root)
    session = TorchSession(load_model(checkpoint), checkpoint.signature)
    score = evaluate(session, source.split("validation"), tile=tile_of(checkpoint.recipe.data.crop)).score
    assert score == pytest.approx(best["score"], abs=1e-6)


def test_list_of_the_splits(whole: tuple[Any, FitResult]) -> None:
    tiny, result = whole
    source = open_source(
        read_checkpoint(result.checkpoint).recipe.data, task=read_checkpoint(result.checkpoint).recipe.task, root=tiny.root
    )
    rows = [line.split(",") for line in (result.directory / "splits.csv").read_text().splitlines()]
    assert rows[0] == ["split", "picture"]
    assert rows[1:] == [[name, sample.name] for name in SPLITS for sample in source.split(name)]


def test_resumed_run_has_the_same_best_weights(whole: tuple[Any, FitResult], tmp_path: Path) -> None:
    tiny, result = whole
    broken = train(tiny, tmp_path / "run", progress=interrupted_at(9))
    assert broken.interrupted and BEST in read_checkpoint(broken.checkpoint).tensors
    resumed = train(tiny, tmp_path / "run", resume=True)
    assert resumed.result == result.result
    assert_same_state(read_checkpoint(resumed.checkpoint), read_checkpoint(result.checkpoint))


def test_run_continued_past_its_end_keeps_its_best_weights(whole: tuple[Any, FitResult], tmp_path: Path) -> None:
    tiny, result = whole
    train(tiny, tmp_path / "run")
    longer = train(tiny, tmp_path / "run", "training.steps=14", resume=True)
    assert longer.step == 14 and longer.result == best_point(longer.validation)
    if longer.result == result.result:
        kept, first = (read_checkpoint(path).tensors[AVERAGE] for path in (longer.checkpoint, result.checkpoint))
        torch.testing.assert_close(kept, first, rtol=0, atol=0)


def test_patience_ends_a_run(whole: tuple[Any, FitResult], tmp_path: Path) -> None:
    tiny, result = whole
    points = result.validation
    end = next(number for number in range(1, len(points)) if out_of_patience(1, points[:number]))
    short = train(tiny, tmp_path / "run", "training.patience=1")
    assert not short.interrupted and short.step == points[end - 1]["step"] < 12 and short.result == points[end - 2]
    assert any("patience (1) ended the run" in note for note in short.notes)
    checkpoint = read_checkpoint(short.checkpoint)
    assert broken_off(checkpoint) == ()
    again = train(tiny, tmp_path / "run", "training.patience=1", resume=True)
    assert again.checkpoint == short.checkpoint and again.step == short.step
    torch.testing.assert_close(read_checkpoint(again.checkpoint).tensors[AVERAGE], checkpoint.tensors[AVERAGE], rtol=0, atol=0)


def test_patience_counts_validations_since_the_first_best() -> None:
    points = [{"step": step, "score": score} for step, score in ((2, 0.1), (4, 0.3), (6, 0.3), (8, 0.2))]
    assert best_point(points) is points[1]
    assert out_of_patience(2, points) and not out_of_patience(3, points) and not out_of_patience(None, points)
    assert not out_of_patience(1, [])


def test_patience_with_closing_gates(whole: tuple[Any, FitResult]) -> None:
    with pytest.raises(RecipeError, match="gate_budget with patience"):
        load_recipe(whole[0].recipe, ["training.patience=2", "training.gate_budget=0.8"])
