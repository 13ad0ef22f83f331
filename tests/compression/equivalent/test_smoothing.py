"""Smoothing of the inputs of Linears. Axes: B rows, N tokens, C channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from model_helpers import answer, by_layer
from muntin.compression import QuantizedLinear, load_compressed, quantize, save
from muntin.compression.equivalent.input_factors import ScaledLinear, factor_structure
from muntin.compression.equivalent.smoothing import SmoothedGroup, find_groups, norms, smooth
from muntin.compression.rewrite import named

C = 32


class OwnNorm(nn.Module):
    """RMS norm as networks write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """A block of a transformer with norms before the attention and the MLP, and an answer from the first token."""

    def __init__(self, norm: Any = lambda: nn.LayerNorm(C)) -> None:
        super().__init__()
        self.norm1, self.norm2, self.last = norm(), norm(), norm()
        self.q, self.k, self.v, self.proj = (nn.Linear(C, C) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(C, 2 * C), nn.Linear(2 * C, C), nn.Linear(C, 5)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, C // 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        mixed = F.scaled_dot_product_attention(*(self.heads(layer(y)) for layer in (self.q, self.k, self.v)))
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        out: Tensor = self.head(self.last(x)[:, 0])
        return out


def uneven(model: Block) -> Block:
    """Some channels of each norm, and of the values, are many times larger than the others."""
    with torch.no_grad():
        for module in norms(model).values():
            module.get_parameter("weight").mul_(torch.logspace(-1, 1, C)[torch.randperm(C)])
        model.v.weight.mul_(torch.logspace(-1, 1, C)[:, None])
    return model.eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return dict(named(model, nn.Linear))


GROUPS = [("norm1", ("q", "k", "v")), ("v", ("proj",)), ("norm2", ("fc1",)), ("last", ("head",))]


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(C), lambda: nn.LayerNorm(C, bias=False), lambda: nn.RMSNorm(C), OwnNorm])
def test_same_answer(norm: Any) -> None:
    model, x = uneven(Block(norm)), torch.randn(4, 9, C)
    found = {group.source: set(group.readers) for group in find_groups(model, linears(model), (x,))}
    assert found == {source: set(readers) for source, readers in GROUPS}
    before, weights = answer(model, x).clone(), copy.deepcopy(model.state_dict())
    changes = by_layer(smooth(model, [(x,)], linears(model), lambda name: 8), "smooth")
    assert {name for name, change in changes.items() if not change.kept} == found.keys()
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    assert {key.partition(".")[0] for key in changed} == {"norm1", "q", "k", "v", "proj", "norm2", "fc1", "last", "head"}
    smoothed = copy.deepcopy(model.state_dict())
    assert smooth(model, [(x,)], linears(model), lambda name: 8) == []
    assert all(torch.equal(value, smoothed[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_error_of_quantized_model(bits: int) -> None:
    base, x = uneven(Block()), torch.randn(8, 9, C)
    exact, errors = answer(base, x).clone(), {}
    for smoothed in (False, True):
        model = copy.deepcopy(base)
        changes = quantize(model, [(x,)], bits=bits, smooth=smoothed, rounding="nearest", correct_bias=False, min_sqnr_db=0)
        assert any(change.pass_ == "smooth" for change in changes) == smoothed
        errors[smoothed] = (answer(model, x) - exact).square().mean()
    assert errors[True] <= (0.8 if bits == 8 else 1) * errors[False]  # of 4 bits, most of the error is the weights'


class After(Block):
    """A sum reads the output of a norm too, as after the blocks of BERT."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        out: Tensor = self.head(self.norm2(y + self.fc2(F.relu(self.fc1(y)))))
        return out


def test_factors_beside_a_residual(tmp_path: Path) -> None:
    model, x = uneven(After()), torch.randn(2, 9, C)
    before = answer(model, x).clone()
    assert find_groups(model, linears(model), (x,)) == [
        SmoothedGroup(source="norm1", readers=("fc1",), alone=False),
        SmoothedGroup(source="fc1", readers=("fc2",)),
        SmoothedGroup(source="norm2", readers=("head",)),
    ]
    changes = by_layer(smooth(model, [(x,)], linears(model), lambda name: 8), "smooth")
    assert "by factors before fc1" in changes["norm1"].done and isinstance(model.fc1, ScaledLinear)
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
    assert all(change.kept for change in smooth(model, [(x,)], linears(model), lambda name: 8))

    quantize(model, [(x,)], bits={"fc1": 6})
    assert isinstance(model.fc1.linear, QuantizedLinear) and model.fc1.linear.bits == 6
    again = load_compressed(save(model, tmp_path / "saved"), After())
    assert torch.equal(answer(again, x), answer(model, x))
    assert all(change.kept for change in quantize(again, [(x,)], bits={"fc1": 6}))


def test_factors_on_a_factored_layer(tmp_path: Path) -> None:
    model, x = uneven(After()), torch.randn(8, 9, C)
    muntin.low_rank(model, [(x,)], parameters=0.85, multiple=2, only=("fc1",))
    quantize(model, [(x,)])
    assert "fc1.reduce" in factor_structure(model)
    again = load_compressed(save(model, tmp_path / "saved"), After())
    assert torch.equal(answer(again, x), answer(model, x))
    quantized = uneven(After())
    quantize(quantized, [(x,)])
    muntin.low_rank(quantized, [(x,)], parameters=0.85, multiple=2, only=("fc1",))
    assert torch.equal(answer(load_compressed(save(quantized, tmp_path / "other"), After()), x), answer(quantized, x))


def test_norm_that_would_change_the_answer() -> None:
    class Shifted(OwnNorm):
        """Its weight is a difference from 1."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.weight) / self.weight

    model, x = uneven(Block(Shifted)), torch.randn(2, 9, C)
    before = answer(model, x).clone()
    changes = by_layer(smooth(model, [(x,)], linears(model), lambda name: 8), "smooth")
    assert changes["norm1"].kept and changes["norm1"].reason == "the answer would change" and not changes["v"].kept
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)


def test_even_channels_are_kept() -> None:
    model = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, C)).eval()
    nn.init.ones_(model[1].weight)
    (change,) = smooth(model, [(torch.randn(64, C).sign(),)], linears(model), lambda name: 8)
    assert change.kept and change.reason == "the error of the quantised outputs of 1 would not be much less"


def test_before_low_rank() -> None:
    model, x = uneven(Block()), torch.randn(8, 9, C)
    before = answer(model, x).clone()
    smooth(model, [(x,)], linears(model), lambda name: 8)
    muntin.low_rank(model, [(x,)], parameters=0.9, multiple=2)
    assert (answer(model, x) - before).square().mean() < 0.1 * before.square().mean()
