"""Factors before Linears."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer
from muntin.compression.equivalent.input_factors import ScaledLinear, apply_factors, factor_structure, insert_factors
from muntin.errors import MuntinError


class Net(nn.Module):
    """Two Linears, of which the model reads the second one's weight beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(input=torch.tanh(self.first(x))) + getattr(self.second, "linear", self.second).weight.sum()
        return out


def test_inserted_where_the_answer_stays() -> None:
    model, x, calls = Net().eval(), torch.randn(5, 6), []
    second, weight = model.second, model.first.weight.detach().clone()
    model.first.register_forward_hook(lambda *_: calls.append(1))
    before = answer(model, x).clone()
    scales = {"a": torch.rand(6) + 0.5, "b": torch.rand(8) + 0.5}
    assert insert_factors(model, {"a": ("first",), "b": ("second",)}, scales, x) == ["b"]
    assert factor_structure(model) == ("first",) and model.second is second
    calls.clear()
    torch.testing.assert_close(answer(model, x), before)
    assert calls == [1]
    assert isinstance(model.first, ScaledLinear) and (model.first.in_features, model.first.out_features) == (6, 8)
    torch.testing.assert_close(model.first.weight, weight)
    assert insert_factors(model, {}, {}, x) == []


def test_structure_of_a_record() -> None:
    model = Net().eval()
    with pytest.raises(MuntinError, match="factors: 'third' is no Linear"):
        apply_factors(model, ["third"])
    x = torch.randn(2, 6)
    before = answer(model, x).clone()
    apply_factors(model, ["first"])
    assert set(model.state_dict()) == {"first.factors", "first.linear.weight", "second.weight", "second.bias"}
    assert torch.equal(answer(model, x), before)
