"""Groups of samples that share the statistics of batch norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.errors import RecipeError
from muntin.training.config import TrainingConfig
from muntin.training.memory.norm_groups import check_norm_groups, group_norms
from muntin.training.precision import resolve_precision
from muntin.training.trainer import Trainer

SMALL = {"stem": [8, 8, 16], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid-xs": {"task": "segment", "options": SMALL},
    "timm:test_efficientnet": {"task": "classify"},  # BatchNormAct2d
    "timm:test_resnet": {"task": "classify"},
}


def trained(model: nn.Module, task: str, **config: Any) -> Trainer:
    """Two steps on a batch of 8, by plain gradient descent: Muon rounds to float32, and AdamW divides by small numbers."""
    settings = TrainingConfig(batch_size=8, learning_rate=1e-3, **config)
    trainer = Trainer(copy.deepcopy(model), settings, task=task, precision=resolve_precision("fp32", "cpu"))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 1e-3)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)
        target = torch.randint(0, 3, (8, 64, 64) if task == "segment" else (8,), generator=generator)
        trainer.update(step, images, target, done=0.5)
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_same_weights_for_every_micro_batch(name: str) -> None:
    torch.manual_seed(0)
    model, task = muntin.create_model(name, classes=3, **MODELS[name]).double(), MODELS[name]["task"]
    whole = trained(model, task, norm_group=2)
    assert whole.memory.unit == 2 and whole.memory.micro_batch == 8
    for config in ({"micro_batch": 2}, {"micro_batch": 4, "checkpointing": "full"}):
        other = trained(model, task, norm_group=2, **config)
        for (key, one), two in zip(whole.model.state_dict().items(), other.model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13, msg=lambda text, key=key: f"{key}: {text}")
    assert list(whole.model.state_dict()) == list(model.state_dict())
    plain = trained(model, task)
    assert plain.memory.unit == 8
    pairs = zip(plain.model.parameters(), whole.model.parameters(), strict=True)
    assert max(float((one - two).detach().abs().max()) for one, two in pairs) > 1e-6  # other groups, other statistics
    evaluated = [trainer.average.model.eval()(torch.ones(1, 3, 64, 64, dtype=torch.float64)) for trainer in (whole, other)]
    torch.testing.assert_close(*evaluated, rtol=1e-9, atol=1e-9)


def test_norm_after_training_takes_any_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    images = torch.rand(8, 3, 4, 4)
    grouped = copy.deepcopy(model)
    group_norms(grouped, 2)
    assert torch.equal(grouped.eval()(images), model.eval()(images))
    one = torch.cat([copy.deepcopy(model).train()(part) for part in images.split(2)])
    torch.testing.assert_close(grouped.train()(images), one)


class Tokens(nn.Module):
    """A norm over tokens as rows, in the order of samples or of tokens."""

    def __init__(self, *, samples_first: bool) -> None:
        super().__init__()
        self.samples_first, self.norm = samples_first, nn.BatchNorm1d(3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        tokens = tokens if self.samples_first else tokens.transpose(0, 1)
        normed: Tensor = self.norm(tokens.flatten(0, 1)).reshape(tokens.shape)
        return (normed if self.samples_first else normed.transpose(0, 1)).mean(1)


def test_rows_in_another_order_are_refused() -> None:
    check_norm_groups(Tokens(samples_first=True), 2, (3, 4, 4), "mine")
    with pytest.raises(RecipeError, match=r"training\.norm_group 2: 'mine' answers to 4 crops otherwise than to 2 and 2"):
        check_norm_groups(Tokens(samples_first=False), 2, (3, 4, 4), "mine")
    with pytest.raises(RecipeError, match="SyncBatchNorm, whose groups are processes"):
        check_norm_groups(nn.SyncBatchNorm(3), 2, (3, 4, 4), "mine")
