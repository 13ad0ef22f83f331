"""Factors of channels between layers. Axes: B images, C channels, H W map."""

from __future__ import annotations

import torch
from torch import nn

from model_helpers import answer
from muntin.compression.equivalent.scaling import Scaling, columns, scale


def test_columns_of_groups() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2)
    factors = columns(layer, torch.arange(1.0, 7))
    assert factors.shape == (4, 3, 1, 1)
    assert factors[:2, :, 0, 0].tolist() == [[1, 2, 3]] * 2 and factors[2:, :, 0, 0].tolist() == [[4, 5, 6]] * 2


def test_answer_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    before, weights = answer(model, x).clone(), [parameter.detach().clone() for parameter in model.parameters()]
    right = Scaling(model[0], (model[2],), torch.rand(8) + 0.5)
    wrong = Scaling(model[2], (model[4],), torch.rand(4) + 0.5)  # tanh does not commute with factors
    assert scale(model, [right, wrong], x) == [wrong]
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(one, parameter) for one, parameter in zip(weights, model.parameters(), strict=True)]
    assert changed == [True, True, True, False, False, False]
    assert scale(model, [], x) == []
