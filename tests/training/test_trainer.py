"""One model in training, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from muntin.training.config import TrainingConfig
from muntin.training.loss import IGNORED
from muntin.training.precision import resolve_precision
from muntin.training.trainer import Trainer


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


def test_a_teacher_says_nothing_of_what_is_ignored() -> None:
    images, target = crops()
    target[:] = IGNORED
    trainer = Trainer(Asked(3, 3, 1), TrainingConfig(), task="segment", precision=resolve_precision("fp32", "cpu"), teacher=Asked(3, 3, 1))
    assert trainer.update(0, images, target, done=0.5) == 0
