"""Batches of old and new crops, and frozen layers."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from muntin.data import Crops
from muntin.data.source import HeldSamples
from muntin.layers.norm import MapNorm
from muntin.tasks.samples import Sample
from muntin.training.config import TrainingConfig
from muntin.training.optimizer import make_optimizer
from muntin.updating.strategies import ReplayCrops, freeze_body


def crops(value: int, size: int) -> Crops:
    sample = Sample(name=f"{value}", image=np.full((16, 16, 3), value, np.uint8), target=np.full((16, 16), value, np.uint8))
    return Crops(HeldSamples([sample]), task="segment", crop=8, batch_size=size, seed=0)


def test_share_of_old_crops() -> None:
    mixed = ReplayCrops(crops(1, 5), crops(2, 5), batch_size=5, share=0.3, seed=0)
    olds = [int((mixed.batch(step)[1][:, 0, 0] == 1).sum()) for step in range(10)]
    assert sum(olds) == 15 and set(olds) == {1, 2}
    images, target = mixed.batch(3)
    assert images.shape == (5, 3, 8, 8) and torch.equal(images[:, 0].long(), target)
    again = mixed.batch(3, slice(1, 3))
    assert torch.equal(again[0], images[1:3]) and torch.equal(again[1], target[1:3])


def test_frozen_body_and_old_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MapNorm(4), nn.Conv2d(4, 5, 1))
    freeze_body(model, {"2.weight": 3, "2.bias": 3}, added=True)
    before, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.0))
    model.train()
    copied.train()
    assert not model[1].training and not copied[1].training and model[2].training
    for _ in range(3):
        model(torch.rand(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"2.weight", "2.bias"}
    assert torch.equal(after["2.weight"][:3], before["2.weight"][:3]) and not torch.equal(after["2.weight"][3:], before["2.weight"][3:])
