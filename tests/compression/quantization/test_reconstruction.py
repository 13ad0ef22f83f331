"""Rounding by reconstruction: units of a model, layers, bits. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from model_helpers import answer, by_layer, pixels
from muntin.compression.quantization.qat import QATConv2d, QATLinear, prepare_qat
from muntin.compression.quantization.reconstruction import float_form, reconstruct
from muntin.compression.quantization.units import units_of
from muntin.compression.rewrite import named
from muntin.errors import MuntinError

NEAREST: dict[str, Any] = {"rounding": "nearest", "min_sqnr_db": 0}


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 3 * dim
        self.expand, self.depthwise = nn.Conv2d(dim, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.project, self.activation = nn.Conv2d(wide, dim, 1), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.activation(self.depthwise(self.activation(self.expand(x)))))
        return out


def network() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*stem, Block(16), Block(16), Block(16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[0].weight.div_(64)
        for block in model[2:5]:
            block.expand.weight.mul_(torch.logspace(-0.7, 0.7, 48)[torch.randperm(48)][:, None, None, None])
    return model.eval()


def smooth(count: int) -> Tensor:
    """Pictures with few details, whose channels are alike."""
    coarse = torch.rand(count, 3, 4, 4) + 0.5 * torch.rand(count, 1, 4, 4)
    return 170 * nn.functional.interpolate(coarse, size=24, mode="bilinear")


def error_of(model: nn.Module, x: Tensor, **options: Any) -> float:
    """Mean squared error of the answer after quantisation, over its variance; calibration images are others."""
    quantized = copy.deepcopy(model)
    muntin.quantize(quantized, smooth(48).split(12), **options)
    exact = answer(model, x)
    return float((answer(quantized, x) - exact).square().mean() / exact.var(0).mean())


def test_error() -> None:
    model, x = network(), smooth(32)
    assert error_of(model, x, bits=3, **NEAREST) > 50 * error_of(model, x, bits=3, min_sqnr_db=0)


def test_units_of_a_model() -> None:
    model, x = network(), smooth(2)
    prepare_qat(model, [x])
    layers: dict[str, nn.Module] = dict(named(model, QATConv2d, QATLinear))
    units = units_of(model, layers, x)
    assert [unit.name for unit in units] == ["0", "2", "3", "4", "7"]
    assert units[1].layers == ("2.expand", "2.depthwise", "2.project")
    assert [unit.follows for unit in units] == [False, False, True, True, False]


def test_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.other(self.one(self.one(x)))
            return out

    changes = by_layer(muntin.quantize(Twice().eval(), [smooth(4)], bits=4, min_sqnr_db=0), "reconstruct")
    assert changes["one"].kept and "exactly once" in changes["one"].reason
    assert not changes["other"].kept


def test_reference_does_not_round() -> None:
    model, x = network(), smooth(2)
    before = answer(model, x)
    prepare_qat(model, [x])
    torch.testing.assert_close(answer(float_form(model), x), before)
    assert not torch.allclose(answer(model, x), before)
    layers: dict[str, Any] = dict(named(model, QATConv2d, QATLinear))
    assert {change.pass_ for change in reconstruct(model, layers, [x])} == {"reconstruct"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bits_by_pattern() -> None:
    model, x = network(), smooth(4)
    changes = by_layer(muntin.quantize(model, [x], bits={"*": 4, "0": 8, "7": 3}, min_sqnr_db=0), "quantize")
    assert (changes["0"].done, changes["2.expand"].done, changes["7"].done) == ("W8A8", "W4A8", "W3A8")
    with pytest.raises(MuntinError, match="bits names no layer: nosuch"):
        muntin.quantize(network(), [x], bits={"nosuch": 4})


def test_average_bits() -> None:
    torch.manual_seed(1)
    model, x = network(), smooth(32)
    quantized = copy.deepcopy(model)
    changes = by_layer(muntin.quantize(quantized, x.split(8), bits=4.3, min_sqnr_db=0), "quantize")
    sizes = {name: layer.weight.numel() for name, layer in named(model, nn.Conv2d, nn.Linear)}
    bits = {name: int(changes[name].done[1]) for name in sizes}
    assert min(bits.values()) == 4 < max(bits.values())
    assert 4 < sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values()) <= 4.3
    narrow, wide = (error_of(model, x, bits=width, min_sqnr_db=0) for width in (4, 4.3))
    assert wide < narrow
    assert all(change.kept for change in muntin.quantize(quantized, x.split(8), bits=4.3, min_sqnr_db=0))
    with pytest.raises(MuntinError, match="or an average between"):
        muntin.quantize(model, x.split(8), bits=8.5)


def test_layers_below_the_threshold_get_more_bits() -> None:
    model, x = network(), smooth(4)
    changes = by_layer(muntin.quantize(model, [x], bits=2, min_sqnr_db=30), "quantize")
    assert {change.done for change in changes.values()} <= {"W8A8", "kept"}
    assert "2 bits leave" in changes["2.expand"].reason and changes["2.expand"].reason.endswith("8 bits")
    before = copy.deepcopy(model.state_dict())
    again = by_layer(muntin.quantize(model, [x], bits=2, min_sqnr_db=30), "quantize")
    assert all(change.kept for change in again.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_bits_of_a_quantised_model() -> None:
    model, x = network(), smooth(4)
    muntin.quantize(model, [x], bits=4, min_sqnr_db=0)
    with pytest.raises(MuntinError, match="bits=8: '0' has 4 bits already"):
        muntin.quantize(model, [x])
    assert all(change.kept for change in muntin.quantize(model, [x], keep=("*",)))


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 1.5}, {"scales": "max"}, {"rounding": "up"}])
def test_unknown_options(options: dict[str, Any]) -> None:
    with pytest.raises(MuntinError, match=f"{next(iter(options))}=.*: give "):
        muntin.quantize(network(), [pixels(1, 3, 24, 24)], **options)


@pytest.mark.parametrize("scales", ["minmax", "percentile"])
def test_scales_differ(scales: str) -> None:
    model, x = network(), smooth(8)
    by_error = copy.deepcopy(model)
    muntin.quantize(by_error, [x], bits=4, **NEAREST)
    muntin.quantize(model, [x], bits=4, scales=scales, **NEAREST)
    peak = model.get_buffer("7.weight_scale")
    assert (by_error.get_buffer("7.weight_scale") <= peak).all() and (by_error.get_buffer("7.weight_scale") < peak).any()
