"""A budget for a run of `muntin fit`, with the data, loss and metric of its recipe."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from muntin import Budget
from muntin.artifact import open_artifact
from muntin.budgeting.candidate import CourseStage
from muntin.budgeting.forms.plans import Form
from muntin.budgeting.run_budget import RecipeCourse, _splits, compress_run
from muntin.budgeting.trials import recorded_steps
from muntin.compression import freeze, load_compressed, load_model
from muntin.data.source import HeldSamples
from muntin.errors import DataError, MuntinError
from muntin.models.eager import eager_copy
from muntin.tasks.samples import Sample
from muntin.training import Checkpoint, fit, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.config import CompressionConfig
from muntin.training.recipe import override_recipe

MODEL = """
from torch import nn

class Small(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make(*, task, classes, channels):
    return Small(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, classes, 3, padding=1))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Any:
    """The checkpoint of a run."""
    root = tmp_path_factory.mktemp("run")
    (root / "two_convolutions.py").write_text(MODEL)
    tiny = write_tiny(root / "data", model={"name": "two_convolutions:make", "options": {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        fit(tiny.recipe, directory=root / "run")
        yield read_checkpoint(root / "run")


def test_compressed_run(trained: Checkpoint, tmp_path: Path) -> None:
    recipe = override_recipe(trained.recipe, ["compression.steps=2", "compression.trials=1"])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    result = compress_run(checkpoint, Budget(max_drop=1), tmp_path / "compressed")
    assert result.kept and len(result.trials) == 2 and result.holdout is not None
    assert 0 <= result.holdout.reference <= 1 and result.holdout.samples is not None and result.holdout.interval is not None
    assert result.artifact.manifest.signature.classes == trained.signature.classes  # type: ignore[union-attr]


def test_three_stages(trained: Checkpoint, tmp_path: Path) -> None:
    shares = [f"compression.{stage}.share={share}" for stage, share in (("recover", 0.2), ("quantize", 0.1), ("mix", 0.2))]
    recipe = override_recipe(trained.recipe, ["compression.course=stages", "compression.steps=5", "compression.trials=1", *shares])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    seen = list[int]()
    result = compress_run(
        checkpoint, Budget(max_drop=1), tmp_path / "c", progress=lambda state: seen.append(state.step * (state.stage == "train"))
    )
    plan = result.trials[1].plan
    ranks = any(form.rank is not None for form in plan.forms.values())
    assert sorted({step for step in seen if step}) == [1, 2, 3, 4, 5] if ranks else [3, 4, 5]
    changes = [(change.pass_, change.done) for change in result.changes if change.pass_ in ("qat", "mix")]
    assert {done for pass_, done in changes if pass_ == "qat"} <= {"W4A8", "W3A8"} and any(pass_ == "mix" for pass_, _ in changes)
    kept = read_checkpoint(result.trials[1].folder)
    record = kept.state.compression
    assert record is not None and (record.origin, record.steps) == (trained.state.weights, trained.state.step) and kept.quantized
    trial = load_model(kept)
    freeze(trial, calibration_of(trained, source_of(trained)))
    images = torch.randint(0, 256, (2, 3, 32, 32)).float()
    assert torch.equal(trial(images), load_compressed(result.trials[1].folder / "model", load_model(trained))(images))
    other = override_recipe(recipe, ["compression.course=direct"])
    with pytest.raises(MuntinError, match="other settings"):
        compress_run(replace(trained, state=trained.state.model_copy(update={"recipe": other})), Budget(max_drop=1), tmp_path / "c")


def test_kept_layers_and_unused_values(trained: Checkpoint, tmp_path: Path) -> None:
    search = ["compression.steps=0", "compression.trials=1", "compression.widths=[1]"]
    changes = ["quantization.keep=['0']", "compression.dense=['*']", "quantization.min_sqnr_db=9"]
    recipe = override_recipe(trained.recipe, [*search, *changes])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    result = compress_run(checkpoint, Budget(max_drop=1), tmp_path / "compressed")
    forms = result.trials[1].plan.forms
    assert forms["0"] == Form(None, 16) and forms["2"].rank is None and forms["2"].bits < 16
    for trial in result.trials:
        bits = {layer.name: layer.activation_bits for layer in open_artifact(trial.artifact).manifest.layers}
        assert (bits["0"], bits["2"]) == (None, 8)
    assert any(note.startswith("quantization.min_sqnr_db is for ") for note in result.notes)
    unknown = override_recipe(recipe, ["compression.keep=['head']"])
    with pytest.raises(MuntinError, match="keep names no layer: head"):
        compress_run(replace(trained, state=trained.state.model_copy(update={"recipe": unknown})), Budget(max_drop=1), tmp_path / "other")


def test_steps_of_a_run_that_ended_early(trained: Checkpoint, tmp_path: Path) -> None:
    shares = [f"compression.{stage}.share={share}" for stage, share in (("recover", 0.2), ("quantize", 0.1), ("mix", 0.2))]
    recipe = override_recipe(trained.recipe, ["training.steps=10000000", "compression.minutes=0", *shares])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    result = compress_run(checkpoint, Budget(max_drop=1), tmp_path / "compressed")
    assert recorded_steps(result.folder) == round(0.5 * trained.state.step) > 0


def interrupted_twice(checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a search that a Ctrl-C ends in the training of the first candidate, and a kill after it, before its artefact."""
    course, train = [], RecipeCourse.train

    def signalled(self: RecipeCourse, stage: CourseStage, model: nn.Module, teacher: nn.Module, *, report: Any, **places: Any) -> float:
        def tell(step: int, loss: float) -> None:
            report(step, loss)
            if step == 2 and not course:
                os.kill(os.getpid(), signal.SIGINT)

        earlier = train(self, stage, model, teacher, report=tell, **places)
        course.append(earlier)
        if len(course) == 1:
            raise SystemExit
        return earlier

    with monkeypatch.context() as patch:
        patch.setattr(RecipeCourse, "train", signalled)
        with pytest.raises(KeyboardInterrupt):
            compress_run(checkpoint, Budget(max_drop=1), folder)
        (written,) = (folder / "training" / "001" / "mixed" / "checkpoints").iterdir()
        assert written.name == "step-00000002"
        with pytest.raises(SystemExit):
            compress_run(checkpoint, Budget(max_drop=1), folder)
        result = compress_run(checkpoint, Budget(max_drop=1), folder)
    assert 0 < course[0] <= course[1]
    return result


def test_interrupted_candidate_goes_on(trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override_recipe(trained.recipe, ["compression.steps=5", "compression.trials=1"])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    whole = compress_run(checkpoint, Budget(max_drop=1), tmp_path / "whole")
    result = interrupted_twice(checkpoint, tmp_path / "parts", monkeypatch)
    assert not (tmp_path / "parts" / "training").exists()
    states = [one.model.state_dict() for one in (whole, result)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert whole.trials[1].score == result.trials[1].score


def test_candidate_is_trained_by_the_recipe(trained: Checkpoint, tmp_path: Path) -> None:
    """Lack of memory at the second step shrinks the micro-batches of this candidate and of those after it."""
    recipe = override_recipe(trained.recipe, ["training.optimizer=lion", "training.micro_batch=null"])
    checkpoint = replace(trained, state=trained.state.model_copy(update={"recipe": recipe}))
    course = RecipeCourse(checkpoint, source_of(checkpoint), CompressionConfig(steps=3, learning_rate=1e-3))
    model, teacher = load_model(checkpoint), load_model(checkpoint)
    before = eager_copy(model).state_dict()
    calls = []

    class Short(type(model)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and x.shape[0] > 1:
                calls.append(x.shape[0])
                if len(calls) == 2:
                    raise MemoryError
            result: torch.Tensor = super().forward(x)
            return result

    model.__class__ = Short
    course.train(course.stages[-1], model, teacher, seed=0, folder=tmp_path / "001" / "mixed", report=lambda *_: None)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert any(note.startswith("trial 1: out of memory at step 2") for note in course.notes)
    assert course.shrunk is not None and course.shrunk.micro_batch < recipe.training.batch_size


class Splits:
    """A source of pictures in memory."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts

    def split(self, name: str) -> HeldSamples:
        image = np.zeros((4, 4, 3), np.uint8)
        return HeldSamples([Sample(name=f"{name} {index}", image=image, target=0) for index in range(self.counts[name])])


def names(samples: Any) -> list[str]:
    return [sample.name for sample in samples]


def test_splits() -> None:
    judged, held_out = _splits(Splits(validation=2, test=1))  # type: ignore[arg-type]
    assert names(judged) == ["validation 0", "validation 1"] and names(held_out) == ["test 0"]
    judged, held_out = _splits(Splits(validation=3, test=0))  # type: ignore[arg-type]
    assert names(judged) == ["validation 0", "validation 2"] and names(held_out) == ["validation 1"]
    with pytest.raises(DataError, match="1 validation pictures and no test pictures"):
        _splits(Splits(validation=1, test=0))  # type: ignore[arg-type]
