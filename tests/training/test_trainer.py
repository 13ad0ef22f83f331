"""One model in training, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin.images import IGNORED
from muntin.tasks.learning import LEARNING
from muntin.training.config import TrainingConfig
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.loss import Loss
from muntin.training.precision import TrainingPrecision, resolve_precision
from muntin.training.trainer import SKIPPED_STEPS, DivergedError, Trainer


def crops() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 8, generator=generator) * 255, torch.randint(0, 3, (2, 8, 8), generator=generator)


class Asked(nn.Conv2d):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x / 255)


class Transposed(nn.Module):
    """Exchanges channels and tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize(("weight", "calls"), [(0.0, 0), (0.5, 1)])
def test_teacher_without_weight(weight: float, calls: int) -> None:
    teacher = Asked(3, 3, 1)
    trainer = Trainer(
        Asked(3, 3, 1), TrainingConfig(), task="segment", precision=resolve_precision("fp32", "cpu"), teacher=teacher, distillation=weight
    )
    trainer.update(0, *crops(), done=0.5)
    assert teacher.calls == calls


@pytest.mark.parametrize(("weight", "overlap"), [(0.0, 0.0), (0.5, 0.7), (2.0, 0.0)])
def test_loss_terms(weight: float, overlap: float) -> None:
    images, target = crops()
    model, teacher = Asked(3, 3, 1), Asked(3, 3, 1)
    scores, expected = model(images).detach(), teacher(images).detach()
    config = TrainingConfig(overlap_loss=overlap)
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"), teacher=teacher, distillation=weight)
    reference = Loss(task="segment", overlap=overlap)(scores, target) + weight * LEARNING["segment"].mean_distance(scores, expected, target)
    assert trainer.update(0, images, target, done=0.5) == pytest.approx(float(reference), rel=1e-5)
    assert weight == 0 or LEARNING["segment"].mean_distance(scores, expected, target) > 0.01
    assert overlap == 0 or Loss(task="segment", overlap=0)(scores, target) < Loss(task="segment", overlap=overlap)(scores, target)


@pytest.mark.parametrize("checkpointing", ["none", "full", {"budget": "1GiB"}])
def test_operator_memory(checkpointing: Any) -> None:
    """A step in chunks of the recipe's size is the step of the whole."""
    steps, most = [], 0

    def watch(layer: nn.Module, inputs: tuple[Tensor], answer: Tensor) -> None:
        nonlocal most
        most = max(most, answer.numel() * answer.element_size())

    for memory in (None, 1 << 16):
        torch.manual_seed(0)
        tokens = nn.Sequential(nn.Linear(3, 256), nn.GELU(), nn.Linear(256, 3))
        tokens[0].register_forward_hook(watch)
        model = nn.Sequential(nn.Flatten(2), Transposed(), tokens, Transposed(), nn.Unflatten(2, (8, 8))).double()
        config = TrainingConfig(operator_memory=memory, checkpointing=checkpointing, batch_size=2)
        trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"))
        trainer.update(0, *crops(), done=0.5)  # a budget is measured here
        most = 0
        value = trainer.update(1, *crops(), done=0.5)
        steps.append((value, [p.detach() for p in model.parameters()]))
        assert (most <= 1 << 16) == (memory is not None) and trainer.loss.memory == (
            memory or (None if checkpointing == "none" else 16 << 20)
        )
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-12)
    torch.testing.assert_close(steps[0][1], steps[1][1], rtol=1e-9, atol=1e-12)


def test_precision_of_a_step() -> None:
    seen = []

    class Watched(Asked):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        precision = TrainingPrecision(name=name, device="cpu", dtype=dtype, reason="")  # type: ignore[arg-type]
        Trainer(Watched(3, 3, 1), TrainingConfig(), task="segment", precision=precision).update(0, *crops(), done=0.5)
    assert seen == [torch.float32, torch.bfloat16]


def test_learning_rate_and_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = []
    clip = nn.utils.clip_grad_norm_

    def watch(parameters: Any, most: float) -> Tensor:
        listed = list(parameters)
        length = clip(listed, most)
        clipped.append((most, float(torch.stack([p.grad.norm() for p in listed]).norm())))
        return length

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watch)
    config = TrainingConfig(clip=1e-3)
    model = nn.Sequential(Asked(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"))
    for done in (0.01, 0.5, 0.99):
        trainer.update(0, *crops(), done=done)
        assert len(trainer.optimizer.param_groups) > 1
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {config.rate_at(done)}
    assert all(most == 1e-3 and length <= 1.001e-3 for most, length in clipped)


def test_teacher_on_ignored_pixels() -> None:
    images, target = crops()
    target[:] = IGNORED
    trainer = Trainer(Asked(3, 3, 1), TrainingConfig(), task="segment", precision=resolve_precision("fp32", "cpu"), teacher=Asked(3, 3, 1))
    assert trainer.update(0, images, target, done=0.5) == 0


class Steep(nn.Conv2d):
    """Has a finite answer, and an infinite gradient while `steep`."""

    steep = True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x / 255)
        y.register_hook(lambda gradient: gradient * (float("inf") if self.steep else 1))
        return y


def test_fp16_skipped_steps() -> None:
    """The loss scaler works on CPUs too."""
    model = Steep(3, 3, 1)
    fp16 = TrainingPrecision(name="fp16", device="cpu", dtype=torch.float16, reason="")
    trainer = Trainer(model, TrainingConfig(), task="segment", precision=fp16)
    before = model.weight.detach().clone()
    for step in range(SKIPPED_STEPS):
        trainer.update(step, *crops(), done=0.5)
    assert torch.equal(model.weight, before) and trainer.scaler.get_scale() == 2.0**16 / 2**SKIPPED_STEPS
    model.steep = False
    trainer.update(SKIPPED_STEPS, *crops(), done=0.5)
    assert not torch.equal(model.weight, before)
    model.steep = True
    for step in range(SKIPPED_STEPS):
        trainer.update(step, *crops(), done=0.5)
    with pytest.raises(
        DivergedError, match=rf"gradient is (nan|inf) at step 21, and the loss [0-9.]+, as in the {SKIPPED_STEPS} steps before"
    ):
        trainer.update(SKIPPED_STEPS, *crops(), done=0.5)


# Averaged weights


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


@pytest.mark.parametrize("longest", [0.5, 0.0])
def test_average_formula(longest: float) -> None:
    model = Counting()
    average = WeightAverage(model, longest)
    expected = 0.0
    for step, value in enumerate([4.0, -2.0, 7.0, 1.0, 3.0, 8.0, 8.0, 2.0, 5.0, 6.0, 0.0, 9.0]):
        model.set(value)
        average.update(model, step)
        decay = min(longest, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.model.weight.tolist() == pytest.approx([expected] * 3, rel=1e-5)
        assert average.model.running_mean.tolist() == pytest.approx([10 * expected] * 2, rel=1e-5)
        assert torch.equal(average.model.mask, model.mask)  # neither averaged nor NaN
    assert decay == longest  # the warm-up ended within the test


def test_average_of_integers() -> None:
    model = Counting()
    model.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    average = WeightAverage(model, 0.99)
    model.set(5)
    model.table += 4
    average.update(model, 0)
    assert average.model.seen.item() == 5 and average.model.seen.dtype == torch.int64
    assert torch.equal(average.model.table, torch.tensor([4, 5, 6])) and average.model.weight.tolist() == pytest.approx([4.5] * 3)


def test_average_of_resized_buffers() -> None:
    model = Counting()
    average = WeightAverage(model, 0.5)
    for size in (3, 4):
        model.register_buffer("grid", torch.arange(float(size)), persistent=False)
        model.mask = torch.full((size,), -torch.inf)
        average.update(model, size)
        assert torch.equal(average.model.grid, model.grid) and torch.equal(average.model.mask, model.mask)
    assert "grid" not in average.model.state_dict() and average.model.grid.data_ptr() != model.grid.data_ptr()


def test_average_is_a_copy() -> None:
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


def test_average_of_assigned_buffers() -> None:
    model = Assigning()
    average = WeightAverage(model, 0.5)
    with torch.inference_mode():
        average.model(torch.ones(3))
    model(torch.ones(3))
    average.update(model, 0)
    assert torch.equal(average.model.length, model.length) and not average.model.length.is_inference()
    assert "length" in average.model.state_dict()
