"""Pooled features and their loss."""

from __future__ import annotations

import copy

import torch
from torch import nn

from muntin.models import create_model
from muntin.training.loss import Loss
from muntin.updating.features import FeatureTaps, UpdateLoss, feature_distance, feature_names, mean_features, pooled


def test_last_map_of_each_resolution() -> None:
    for preset in ("hybrid-xxs", "hybrid-xs"):
        model = create_model(preset, classes=3)
        names = feature_names(model, torch.zeros(1, 3, 256, 256), {"head.conv.weight"})
        taps = FeatureTaps(model, names).attach()
        model.eval()(torch.zeros(3, 3, 256, 256))
        shapes = [tuple(one.shape) for one in taps.take()]
        assert all(shape[0] == 3 and shape[2] == shape[3] for shape in shapes) and len({shape[2] for shape in shapes}) == len(shapes) >= 3
        assert not any(name.startswith(("head", "normalize")) for name in names)


def test_pooling_and_distance() -> None:
    maps = torch.rand(2, 3, 5, 7)
    assert pooled(maps).shape == (2, 3 * (5 + 7 + 2 * (5 + 7)))
    assert feature_distance([maps], [maps]).tolist() == [0, 0]
    assert torch.allclose(feature_distance([2 * maps], [maps]), torch.ones(2))
    assert torch.allclose(pooled(maps)[:, :15], maps.mean(3).flatten(1))


def test_loss_adds_features_and_scores() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = copy.deepcopy(teacher)
    model[2] = nn.Conv2d(4, 3, 1)  # one more class
    images, target = torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    target[0, 0] = 255
    taps = FeatureTaps(model, ("1",)).attach(), FeatureTaps(teacher, ("1",)).attach()
    loss = UpdateLoss(task="segment", overlap=1.0, distillation=1.0, scores=0.0, features=2.0, taps=taps)
    plain = Loss(task="segment", overlap=1.0)
    scores, expected = model(images), teacher(images).detach()
    assert torch.allclose(loss(scores, target, expected), plain(scores, target))  # equal features
    model[0].weight.data *= 1.5
    model[0].bias.data *= 1.5
    scores, expected = model(images), teacher(images).detach()
    added = loss(scores, target, expected) - plain(scores, target)
    assert torch.allclose(added, torch.tensor(2 * 0.25), atol=1e-4)
    added.backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.abs().sum() > 0


def test_mean_features() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    features = mean_features(FeatureTaps(model, ("0",)).attach(), torch.zeros(6, 5, 3, dtype=torch.uint8).numpy())
    assert features.shape == (4,) and torch.allclose(torch.from_numpy(features), model[0].bias.detach())
