"""Cross-layer equalisation. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from model_helpers import answer, pixels
from muntin.compression.equivalent.equalization import ScaledPair, equalize, find_pairs
from muntin.compression.rewrite import named


class Chain(nn.Module):
    """Convolutions with functions between them; one output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.third, self.fourth, self.fifth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x / 255))
        x = torch.relu_(self.second(F.pad(x, (0, 1, 0, 1))))
        x = self.third(x)
        out: Tensor = self.fifth(F.silu(self.fourth(x)) + x)
        return out


def uneven() -> Chain:
    model = Chain().eval()
    with torch.no_grad():
        spread = torch.logspace(-1.5, 0, 8)
        for layer in (model.first, model.second):
            layer.weight.abs_().mul_(spread[:, None, None, None])
            layer.bias.abs_().mul_(spread)
    return model


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return dict(named(model, nn.Linear, nn.Conv2d))


def test_pairs_of_a_model() -> None:
    model = uneven()
    pairs = find_pairs(model, layers_of(model), pixels(1, 3, 8, 8))
    assert pairs == [ScaledPair(first="first", second="second"), ScaledPair(first="second", second="third")]


def test_same_answer_and_even_channels() -> None:
    model, x = uneven(), pixels(4, 3, 8, 8)
    before = answer(model, x)
    ranges = [_ranges(model, x)]
    changes = equalize(model, [x], layers_of(model), lambda name: 8)
    ranges.append(_ranges(model, x))
    assert [change.layer for change in changes] == ["second", "third"]
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
    assert ranges[0].max() / ranges[0].min() > 10 > 2 > ranges[1].max() / ranges[1].min()
    weights = copy.deepcopy(model.state_dict())
    assert equalize(model, [x], layers_of(model), lambda name: 8) == []
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def _ranges(model: Chain, x: Tensor) -> Tensor:
    """The range of each channel between the first two layers."""
    return F.relu(model.first(x / 255)).amax((0, 2, 3)).detach()


def test_relu6_is_in_no_pair() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    assert find_pairs(model, layers_of(model), pixels(1, 3, 8, 8)) == [ScaledPair(first="2", second="4")]


def test_answer_that_would_change() -> None:
    class Reads(Chain):
        """Reads a weight beside calling its layer."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.first.weight.sum() * self.second.weight.sum()

    model, x = Reads().eval(), pixels(2, 3, 8, 8)
    model.load_state_dict(uneven().state_dict())
    before = answer(model, x)
    changes = equalize(model, [x], layers_of(model), lambda name: 8)
    assert [change.layer for change in changes] == ["third"] or not changes
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
