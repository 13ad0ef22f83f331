"""Folding removes norms and gates and keeps the answer. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer
from muntin import create_model
from muntin.compression import fold
from muntin.compression.equivalent.fold import fold_after, fold_before, fold_gate
from muntin.layers import ChannelGate, ConvUnit, Gain, LocalAttention, MapNorm, TokenNorm
from muntin.layers.block import ParallelBlock, Perceptron
from muntin.layers.windows import Grid

SMALL = {"depths": (1, 1), "dims": (32, 32), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": (1, 1)}
GRID = Grid(batch=2, height=1, width=5, window=None, rows=1, columns=1, bias_S1T=None)


def as_trained(model: nn.Module) -> nn.Module:
    """Give norms random statistics and gates values below 0, between 0 and 1, and above 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MapNorm | TokenNorm):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.2, 3)
            elif isinstance(module, ChannelGate):
                module.logit.uniform_(-0.5, 1.3)
    return model.eval()


@pytest.mark.parametrize("block", ["parallel", "serial"])
@pytest.mark.parametrize("attention", ["hybrid", "local", "global", "dense"])
def test_hybrid_answer_after_folding(block: str, attention: str) -> None:
    model = as_trained(create_model("hybrid-xs", options={**SMALL, "block": block, "attention": attention}))
    gates = [module for module in model.modules() if isinstance(module, ChannelGate)]
    assert all(0 < int(gate.open_channels().sum()) < gate.dim for gate in gates)  # some of each are closed
    x = torch.rand(2, 3, 37, 50) * 255
    before = answer(model, x)
    changes = fold(model)
    after = answer(model, x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert not [name for name, module in model.named_modules() if isinstance(module, MapNorm | TokenNorm | ChannelGate | Gain)]
    assert all(change.pass_ == "fold" and not change.kept for change in changes)


def test_changes_by_unit() -> None:
    model = as_trained(create_model("hybrid-xs", options=SMALL))
    units = {name for name, module in model.named_modules() if isinstance(module, ConvUnit)}
    blocks = {f"stages.{stage}.blocks.0{part}" for stage in (0, 1) for part in ("", ".mlp")}
    pairs = {"stage4.0", "stage8.1"}  # whose gates fold
    names = [change.layer for change in fold(model)]
    assert sorted(names) == sorted(units | blocks | pairs | {"head"})


def test_gate_behind_gelu() -> None:
    model = as_trained(create_model("hybrid-xs", options=SMALL))
    for module in model.modules():
        if isinstance(module, Perceptron):
            module.activation = nn.GELU()  # type: ignore[assignment]
    x = torch.rand(2, 3, 37, 50) * 255
    before = answer(model, x)
    fold(model)
    assert (answer(model, x) - before).abs().max() <= 1e-5 * before.abs().max()
    assert [module for module in model.modules() if isinstance(module, ChannelGate)]


def test_idempotence() -> None:
    model = as_trained(create_model("hybrid-xs", options=SMALL))
    fold(model)
    folded = copy.deepcopy(model.state_dict())
    assert fold(model) == []
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())


def test_models_without_gates_and_other_tasks() -> None:
    x = torch.rand(1, 3, 40, 33) * 255
    for task in ("classify", "restore"):
        model = as_trained(create_model("hybrid-xs", task=task, options={**SMALL, "gate": False}))
        before = answer(model, x)
        fold(model)
        torch.testing.assert_close(answer(model, x), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_training_mode() -> None:
    model = as_trained(create_model("hybrid-xs", options=SMALL)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fold(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_foreign_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.LayerNorm(9), nn.Linear(9, 4)).eval()
    before = copy.deepcopy(model.state_dict())
    assert fold(model) == []
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_subclass_of_a_unit() -> None:
    class Doubled(ConvUnit):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            out: Tensor = self.activation(self.norm(2 * self.conv(x_BCHW)))
            return out

    model = as_trained(nn.Sequential(Doubled(3, 4)))
    x = torch.randn(1, 3, 5, 5)
    before = answer(model, x)
    assert fold(model) == []
    assert torch.equal(answer(model, x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_rules_against_references(bias: bool) -> None:
    conv, map_norm = nn.Conv2d(4, 6, 3, groups=2, bias=bias).double(), as_trained(MapNorm(6)).double()
    linear, token_norm, gate = nn.Linear(4, 6, bias=bias).double(), as_trained(TokenNorm(4)).double(), as_trained(ChannelGate(6)).double()
    x_BCHW, t_STC = torch.randn(2, 4, 5, 7, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    assert isinstance(map_norm, MapNorm) and isinstance(token_norm, TokenNorm) and isinstance(gate, ChannelGate)
    with torch.no_grad():
        expected_map = map_norm(conv(x_BCHW))
        expected_tokens = gate(torch.relu(linear(token_norm(t_STC, GRID))))
        fold_after(conv, map_norm)
        fold_before(token_norm, linear)
        fold_gate(linear, gate)
        torch.testing.assert_close(conv(x_BCHW), expected_map, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.relu(linear(t_STC)), expected_tokens, rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    """Two units that share a part."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.shared = shared
        if shared == "attention":
            attention = LocalAttention(16, heads=2, window=4)
            units: tuple[nn.Module, ...] = tuple(ParallelBlock(16, attention=attention, gate=False) for _ in range(2))
        elif shared == "unit":
            units = (ConvUnit(16, 16),) * 2
        else:
            units = (ConvUnit(16, 16), ConvUnit(16, 16))
        self.stem, self.units = ConvUnit(3, 16), nn.ModuleList(units)
        if shared == "weight":
            self.units[1].conv.weight = self.units[0].conv.weight  # type: ignore[union-attr, assignment]
        if shared == "layer":
            self.units[1].conv = self.units[0].conv
        if shared == "activation":
            self.units[1].activation = self.units[0].activation

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.stem(x_BCHW)
        x = x.movedim(1, -1) if self.shared == "attention" else x
        for unit in self.units:
            x = unit(x)
        return x


@pytest.mark.parametrize(("shared", "folds"), [("attention", 0), ("weight", 0), ("layer", 0), ("unit", 1), ("activation", 2)])
def test_parts_of_two_units(shared: str, folds: int) -> None:
    model = as_trained(Twice(shared))
    x = torch.randn(2, 3, 12, 12)
    before = answer(model, x)
    changes = [change for change in fold(model) if change.layer.startswith("units")]
    assert [change.kept for change in changes] == ([False] * folds or [True] * 2)
    assert all("also used elsewhere" in (change.reason or "") for change in changes if change.kept)
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-4)


def test_part_with_a_hook() -> None:
    model = as_trained(nn.Sequential(ConvUnit(3, 8), ConvUnit(8, 8)))
    model[1].conv.register_forward_hook(lambda layer, inputs, output: output * 2)  # type: ignore[index, union-attr, operator]
    x = torch.randn(2, 3, 9, 9)
    before = answer(model, x)
    assert [(change.layer, change.kept) for change in fold(model)] == [("0", False), ("1", True)]
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-4)
