"""One model in training, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin.runtime.images import IGNORED
from muntin.training.config import TrainingConfig
from muntin.training.loss import distillation_loss, task_loss
from muntin.training.precision import Precision, resolve_precision
from muntin.training.schedule import learning_rate
from muntin.training.trainer import LEFT_OUT, DivergedError, Trainer


def crops() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 8, 8, generator=generator) * 255, torch.randint(0, 3, (2, 8, 8), generator=generator)


class Asked(nn.Conv2d):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x / 255)


@pytest.mark.parametrize(("weight", "calls"), [(0.0, 0), (0.5, 1)])
def test_a_teacher_without_weight_is_not_asked(weight: float, calls: int) -> None:
    teacher = Asked(3, 3, 1)
    trainer = Trainer(
        Asked(3, 3, 1), TrainingConfig(), task="segment", precision=resolve_precision("fp32", "cpu"), teacher=teacher, distillation=weight
    )
    trainer.update(0, *crops(), done=0.5)
    assert teacher.calls == calls


@pytest.mark.parametrize(("weight", "overlap"), [(0.0, 0.0), (0.5, 0.7), (2.0, 0.0)])
def test_the_loss_is_made_of_labels_overlap_and_teacher(weight: float, overlap: float) -> None:
    images, target = crops()
    model, teacher = Asked(3, 3, 1), Asked(3, 3, 1)
    scores, wanted = model(images).detach(), teacher(images).detach()
    config = TrainingConfig(overlap_loss=overlap)
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"), teacher=teacher, distillation=weight)
    due = task_loss("segment", scores, target, overlap=overlap) + weight * distillation_loss("segment", scores, wanted, target)
    assert trainer.update(0, images, target, done=0.5) == pytest.approx(float(due), rel=1e-5)
    assert weight == 0 or distillation_loss("segment", scores, wanted, target) > 0.01
    assert overlap == 0 or task_loss("segment", scores, target, overlap=0) < task_loss("segment", scores, target, overlap=overlap)


def test_a_step_computes_in_the_precision_that_was_asked_for() -> None:
    seen = []

    class Watched(Asked):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        precision = Precision(name=name, device="cpu", dtype=dtype, reason="")  # type: ignore[arg-type]
        Trainer(Watched(3, 3, 1), TrainingConfig(), task="segment", precision=precision).update(0, *crops(), done=0.5)
    assert seen == [torch.float32, torch.bfloat16]


def test_the_rate_falls_for_every_parameter_and_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = []
    clip = nn.utils.clip_grad_norm_

    def watch(parameters: Any, most: float) -> Tensor:
        found = list(parameters)
        length = clip(found, most)
        clipped.append((most, float(torch.stack([p.grad.norm() for p in found]).norm())))
        return length

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watch)
    config = TrainingConfig(clip=1e-3)
    model = nn.Sequential(Asked(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"))
    for done in (0.01, 0.5, 0.99):
        trainer.update(0, *crops(), done=done)
        assert len(trainer.optimizer.param_groups) > 1
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {learning_rate(done, config)}
    assert all(most == 1e-3 and length <= 1.001e-3 for most, length in clipped)


def test_a_teacher_says_nothing_of_what_is_ignored() -> None:
    images, target = crops()
    target[:] = IGNORED
    trainer = Trainer(Asked(3, 3, 1), TrainingConfig(), task="segment", precision=resolve_precision("fp32", "cpu"), teacher=Asked(3, 3, 1))
    assert trainer.update(0, images, target, done=0.5) == 0


class Steep(nn.Conv2d):
    """Its gradient is infinite while `steep`, and its answer a number."""

    steep = True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x / 255)
        y.register_hook(lambda gradient: gradient * (float("inf") if self.steep else 1))
        return y


def test_fp16_leaves_steps_out_but_not_for_ever() -> None:
    """The loss scale and its counter as on a GPU: CPUs have both."""
    model = Steep(3, 3, 1)
    fp16 = Precision(name="fp16", device="cpu", dtype=torch.float16, reason="")
    trainer = Trainer(model, TrainingConfig(), task="segment", precision=fp16)
    before = model.weight.detach().clone()
    for step in range(LEFT_OUT):
        trainer.update(step, *crops(), done=0.5)
    assert torch.equal(model.weight, before) and trainer.scaler.get_scale() == 2.0**16 / 2**LEFT_OUT
    model.steep = False
    trainer.update(LEFT_OUT, *crops(), done=0.5)
    assert not torch.equal(model.weight, before)
    model.steep = True
    for step in range(LEFT_OUT):
        trainer.update(step, *crops(), done=0.5)
    with pytest.raises(DivergedError, match=rf"gradient is (nan|inf) at step 21, and the loss [0-9.]+, as in the {LEFT_OUT} steps before"):
        trainer.update(LEFT_OUT, *crops(), done=0.5)
