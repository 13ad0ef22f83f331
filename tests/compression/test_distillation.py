from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer, one_line
from muntin import distil, freeze, prepare_qat, quantize
from muntin.errors import MuntinError
from muntin.runtime import describe_hardware
from muntin.training.precision import PrecisionName
from muntin.training.trainer import DivergedError

BATCHES = [torch.randn(16, 6) for _ in range(4)]


def perceptron(hidden: int = 32, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)).eval()


@pytest.mark.parametrize(("loss", "optimizer"), [("scores", "adamw"), ("features", "muon"), ("features", "lion")])
def test_student_learns(loss: Any, optimizer: Any) -> None:
    teacher, student, losses = perceptron(), perceptron(16), []
    course = distil(
        student, teacher, BATCHES, steps=80, loss=loss, optimizer=optimizer, learning_rate=3e-3, report=lambda *at: losses.append(at)
    )
    assert course.steps == 80 and course.skipped == 0 and course.loss < 0.5 * course.first_loss
    assert [step for step, _ in losses] == list(range(1, 81)) and losses[0][1] == course.first_loss
    assert not student.training and not teacher.training


def test_same_seed_same_weights() -> None:
    teacher, student = perceptron(), nn.Sequential(nn.Dropout(0.3), *perceptron(16))
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        one = copy.deepcopy(student)
        distil(one, teacher, BATCHES, steps=6, seed=seed)
        states.append(torch.cat([parameter.flatten() for parameter in one.parameters()]))
        assert torch.initial_seed() == len(states) - 1
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_measured_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the measurement are dropped: the student is trained as without them."""
    monkeypatch.setattr("muntin.training.precision.cpu_computes_bf16", lambda: True)
    monkeypatch.setattr("muntin.training.precision.MIN_GAIN", 1e9)
    teacher, students = perceptron(), [perceptron(16)]
    students.append(copy.deepcopy(students[0]))
    assert distil(students[0], teacher, BATCHES, steps=2).precision == "fp32: the run is too short to measure BF16"
    monkeypatch.setattr("muntin.training.precision.MAX_SHARE", 9.0)
    assert distil(students[1], teacher, BATCHES, steps=2).precision.startswith("fp32: BF16 is ")
    states = [student.state_dict() for student in students]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_prepared_student() -> None:
    teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    student = copy.deepcopy(teacher)
    prepare_qat(student, BATCHES, bits=3)
    course = distil(student, teacher, BATCHES, steps=60, loss="features")
    assert course.loss < course.first_loss
    freeze(student)
    with pytest.raises(MuntinError, match="no parameter of the student is trained"):
        distil(student, teacher, BATCHES, steps=1)


def test_named_inputs_and_trained_loss() -> None:
    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, width), nn.Linear(width, width)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"features": self.out(self.table(ids)), "ids": ids}

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

        def forward(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
            return (self.up(one["features"]) - other["features"]).square().mean()

    batches, loss = [{"ids": torch.randint(0, 9, (4, 5))} for _ in range(3)], Projected()
    before = loss.up.weight.clone()
    half: PrecisionName = "bf16" if {"avx512_bf16", "amx_bf16"} & set(describe_hardware()["features"]) else "fp32"
    course = distil(Named(4), Named(8), iter(batches), steps=3, loss=loss, precision=half)  # the loss gets FP32
    assert course.steps == 3 and not torch.equal(loss.up.weight, before)
    with pytest.raises(MuntinError, match="the student answers with a dict of 2 tensors: give a loss function"):
        distil(Named(4), Named(8), batches, steps=1)


def test_unsound_batches() -> None:
    teacher, student = perceptron(), perceptron(16)
    bad = torch.full((16, 6), float("nan"))
    course = distil(student, teacher, [BATCHES[0], bad], steps=8)
    assert course.skipped > 0 and course.steps == 8
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(DivergedError, match="the loss is nan, after 5 other unsound batches"):
        distil(student, teacher, [bad], steps=8)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert answer(student, BATCHES[0]).isfinite().all()


def test_wrong_arguments() -> None:
    teacher, student = perceptron(), perceptron(16)
    for arguments, message in (
        ({}, "neither steps nor minutes"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1, "loss": "scores of"}, "loss='scores of': give 'scores', 'features' or a function"),
        ({"steps": 1, "precision": "f8"}, "precision='f8'"),
        ({"steps": 1, "loss": lambda one, other: (one - other).square()}, r"the loss has the shape \(16, 4\)"),
        ({"steps": 9, "inputs": iter(BATCHES)}, "an iterator that has ended"),
        ({"steps": 1, "teacher": student}, "the student is the teacher"),
        ({"steps": 1, "teacher": perceptron(outputs=5)}, r"the student answers with \(16, 4\) and the teacher with \(16, 5\)"),
    ):
        with pytest.raises(MuntinError, match=message) as error:
            distil(**{"student": student, "teacher": teacher, "inputs": BATCHES, **arguments})  # type: ignore[arg-type]
        one_line(error)


def test_minutes() -> None:
    course = distil(perceptron(16), perceptron(), BATCHES, minutes=0.002)
    assert course.steps >= 1


def test_old_calling_forms() -> None:
    """A pass called as in earlier versions names the argument that is missing."""
    with pytest.raises(TypeError, match="calibration"):
        quantize(BATCHES)  # type: ignore[call-arg, arg-type]
    with pytest.raises(MuntinError, match="the model is of type list"):
        quantize(BATCHES, perceptron())  # type: ignore[arg-type]
    with pytest.raises(MuntinError, match="calibration is a Tensor: give an iterable of batches"):
        quantize(perceptron(), BATCHES[0])
