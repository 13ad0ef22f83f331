"""The gradient of a batch in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from muntin.images import IGNORED
from muntin.training.gradients import BatchGradient, buffers_kept
from muntin.training.loss import Loss
from muntin.training.precision import resolve_precision

PRECISION = resolve_precision("fp32", "cpu")


class Noisy(nn.Module):
    """A group norm, a dropout, and a running statistic; (B, 3, H, W) -> (B, 4, H, W) or (B, 4)."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.drop, self.pooled = nn.GroupNorm(2, 8), nn.Dropout(0.3), pooled
        self.register_buffer("running_mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x / 255)
        self.running_mean = self.running_mean * 0.9 + 0.1 * x.detach().mean((0, 2, 3))
        x = self.second(self.drop(self.norm(x).relu()))
        return x.mean((2, 3)) if self.pooled else x


def rows(task: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (6, 3, 9, 7), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 4, (6, 9, 7) if task == "segment" else (6,), generator=generator)
    if task == "segment":
        target[0, :5] = IGNORED  # parts have different numbers of pixels
        target[:4][target[:4] == 2] = IGNORED  # and some lack a class
    return images, target


def gradient(loss: Loss, part: int, make: Callable[[], nn.Module], teacher: nn.Module | None) -> tuple[float, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = make().double()
    images, target = rows(loss.task)
    batch = BatchGradient(model, model, loss, PRECISION, teacher, images=images, target=target, part=part, seed=(1, 2))
    sums = batch.forward()
    totals = batch.totals(sums)
    by_sums = loss.gradient(totals.new_zeros(2) if sums is None else sums, totals)
    own = batch.backward(by_sums)
    value = float(loss.value(own, totals))
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model.running_mean


LOSSES = [
    Loss(task="segment", overlap=1.0),
    Loss(task="segment", overlap=0.0),
    Loss(task="segment", overlap=0.7, distillation=0.5),
    Loss(task="segment", overlap=0.7, distillation=0.5, memory=20_000),
    Loss(task="classify", distillation=2.0),
    Loss(task="classify", distillation=2.0, memory=100),
    Loss(task="segment", dice=True, overlap=1.0, weights=(0.5, 1.0, 3.0, 0.1), gamma=2.0),
    Loss(task="segment", weights=(0.5, 1.0, 3.0, 0.1)),
    Loss(task="classify", weights=(0.5, 1.0, 3.0, 0.1), gamma=2.0, distillation=0.5, memory=100),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("part", [1, 2, 4])
def test_parts_have_the_gradient_of_the_whole(loss: Loss, part: int) -> None:
    def make() -> nn.Module:
        model = Noisy(loss.task == "classify")
        model.drop.p = 0.0
        return model

    torch.manual_seed(9)
    teacher = make().double() if loss.distillation else None
    images, target = rows(loss.task)
    torch.manual_seed(0)
    model = make().double()
    scores = model(images.double())
    value = loss(scores, target, None if teacher is None else teacher(images.double()).detach())
    value.backward()
    got, gradients, _ = gradient(loss, part, make, teacher)
    assert got == pytest.approx(value.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-15)


def test_both_passes_draw_the_same_random_numbers() -> None:
    """With dropout, the loss of the first pass is that of the second, and statistics move once."""
    loss = LOSSES[0]
    torch.manual_seed(0)
    model = Noisy(False).double()
    images, target = rows("segment")
    batch = BatchGradient(model, model, loss, PRECISION, None, images=images, target=target, part=2, seed=(1, 2))
    first = batch.forward()
    assert first is not None and torch.equal(model.running_mean, torch.zeros(8, dtype=torch.float64))
    second = batch.backward(loss.gradient(first, batch.totals(first)))
    assert torch.equal(first, second) and not torch.equal(model.running_mean, torch.zeros(8, dtype=torch.float64))


def test_buffers_kept_after_an_error() -> None:
    model = Noisy(False)
    before = model.running_mean
    with pytest.raises(ValueError, match="here"), buffers_kept(model):
        model(torch.ones(1, 3, 4, 4))
        raise ValueError("here")
    assert model.running_mean is before and not before.any()
