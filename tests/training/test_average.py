from __future__ import annotations

import pytest
import torch
from torch import nn

from muntin.training.average import WeightAverage


class Counting(nn.Module):
    """A parameter, a statistic and a counter."""

    running_mean: torch.Tensor
    mask: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0, -torch.inf]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.running_mean.fill_(10 * value)
            self.seen.fill_(int(value))


def test_the_average_is_its_formula() -> None:
    model = Counting()
    average = WeightAverage(model, 0.5)
    expected = 0.0
    for step, value in enumerate([4.0, -2.0, 7.0, 1.0, 3.0, 8.0, 8.0, 2.0, 5.0, 6.0, 0.0, 9.0]):
        model.set(value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.model.weight.tolist() == pytest.approx([expected] * 3, rel=1e-5)
        assert average.model.running_mean.tolist() == pytest.approx([10 * expected] * 2, rel=1e-5)
        assert torch.equal(average.model.mask, model.mask)  # neither averaged nor NaN
    assert decay == 0.5  # the warm-up ended within the test


def test_counters_are_copied() -> None:
    model = Counting()
    average = WeightAverage(model, 0.99)
    model.set(5)
    average.update(model, 0)
    assert average.model.seen.item() == 5
    assert average.model.seen.dtype == torch.int64


def test_indices_that_are_parameters_are_copied() -> None:
    model = Counting()
    model.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    average = WeightAverage(model, 0.99)
    model.set(5)
    model.table += 4
    average.update(model, 0)
    assert torch.equal(average.model.table, torch.tensor([4, 5, 6])) and average.model.weight.tolist() == pytest.approx([4.5] * 3)


def test_buffers_that_a_size_brings_are_taken_as_they_are() -> None:
    model = Counting()
    average = WeightAverage(model, 0.5)
    for size in (3, 4):
        model.register_buffer("grid", torch.arange(float(size)), persistent=False)
        model.mask = torch.full((size,), -torch.inf)
        average.update(model, size)
        assert torch.equal(average.model.grid, model.grid) and torch.equal(average.model.mask, model.mask)
    assert "grid" not in average.model.state_dict() and average.model.grid.data_ptr() != model.grid.data_ptr()


def test_without_decay_the_average_is_the_model() -> None:
    model = Counting()
    average = WeightAverage(model, 0)
    model.set(3)
    average.update(model, 1000)
    assert torch.equal(average.model.weight, model.weight)
    assert torch.equal(average.model.running_mean, model.running_mean)


def test_the_average_is_a_model_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = WeightAverage(model, 0.9)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(average.model[0].weight, before)
    assert model[0].weight.requires_grad
    average.update(model, 0)
    assert not torch.equal(average.model[0].weight, before)


class Assigning(nn.Module):
    """Assigns a buffer of the same shape in each forward pass."""

    length: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("length", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.length = self.weight.detach().norm()
        return x * self.weight / self.length


def test_a_buffer_that_a_validation_assigned_is_averaged_on() -> None:
    model = Assigning()
    average = WeightAverage(model, 0.5)
    with torch.inference_mode():
        average.model(torch.ones(3))
    model(torch.ones(3))
    average.update(model, 0)
    assert torch.equal(average.model.length, model.length) and not average.model.length.is_inference()
    assert "length" in average.model.state_dict()
