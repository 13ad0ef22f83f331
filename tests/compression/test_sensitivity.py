"""Bits of layers: measured on a network with one fragile layer, and chosen on plain numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model_helpers import answer, pixels
from muntin import create_model
from muntin.compression import prepare_qat, set_bits
from muntin.compression.quantization.qat import FLOAT, bits_of
from muntin.compression.sensitivity import BETTER, LEAST, STORED, WIDER, assign_bits, measure_sensitivity
from muntin.errors import MuntinError
from muntin.models.compression_record import Sensitivity
from muntin.tasks.learning import LEARNING

SMALL = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}


def distance(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    return float(LEARNING["segment"].mean_distance(answer(model, x), answer(teacher, x)))


class Fragile(nn.Module):
    """Four 1x1 convolutions. 4 bits ruin the third: each of its channels has a huge weight for a map of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(a, b, 1) for a, b in ((3, 16), (16, 16), (16, 16), (16, 4)))
        with torch.no_grad():
            self.second.weight[0], self.second.bias[0] = 0, -1  # type: ignore[index]
            self.third.weight[:, 0] = 1.5

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x / 64 - 2))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        out: Tensor = 4 * self.fourth(x)
        return out


@pytest.fixture
def fragile() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network in W4A8 with a fragile layer, the same in float, and pictures."""
    teacher, x = Fragile().eval(), pixels(4, 3, 12, 12)
    model = copy.deepcopy(teacher)
    prepare_qat(model, [x])
    return model, teacher, x


Net = tuple[nn.Module, nn.Module, Tensor]

# ---- measuring ----


def test_fragile_layer_has_the_largest_gain(fragile: Net) -> None:
    model, teacher, x = fragile
    measured = measure_sensitivity(model, teacher, [x], task="segment")
    assert list(measured) == ["first", "second", "third", "fourth"]
    for name, entry in measured.items():
        layer = model.get_submodule(name)
        assert (entry.bits, entry.weights, tuple(entry.gains)) == (4, layer.weight.numel(), WIDER)  # type: ignore[operator]
    gains = {name: max(entry.gains.values()) for name, entry in measured.items()}
    assert gains["third"] > 0.5
    assert gains["third"] > 2 * max(gain for name, gain in gains.items() if name != "third")


def test_fragile_layer_gets_bits_first(fragile: Net) -> None:
    model, teacher, x = fragile
    measured = measure_sensitivity(model, teacher, [x], task="segment")
    weights = sum(entry.weights for entry in measured.values())
    room = 4 + 4 * measured["third"].weights / weights + 1e-6  # for 8 bits of this layer, and of no other beside it
    bits = assign_bits(measured, room)
    assert bits == {"first": 4, "second": 4, "third": 8, "fourth": 4}


def test_gain_against_reference(fragile: Net) -> None:
    """The reference is a new model in which one layer has more than 4 bits."""
    model, teacher, x = fragile
    measured = measure_sensitivity(model, teacher, [x[:2], x[2:]], task="segment")
    before = distance(model, teacher, x)
    for width in WIDER:
        assert abs(measured["second"].gains[width]) > 1e-3
        other = copy.deepcopy(teacher)
        prepare_qat(other, [x], keep=("second",) if width == FLOAT else ())
        if width != FLOAT:
            wide = copy.deepcopy(teacher)
            prepare_qat(wide, [x], bits=width)
            other.second = wide.second
        assert measured["second"].gains[width] == pytest.approx(1 - distance(other, teacher, x) / before, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["fragile", "hybrid"])
def test_model_is_unchanged(name: str, fragile: Net) -> None:
    model, teacher, x = fragile
    if name == "hybrid":
        teacher = create_model("hybrid-xs", options=SMALL).eval()
        model, x = copy.deepcopy(teacher), pixels(2, 3, 32, 32)
        prepare_qat(model, [x])
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    scores, bits, trained = answer(model, x).clone(), bits_of(model), copy.deepcopy(teacher.state_dict())
    measure_sensitivity(model, teacher, [x], task="segment")
    assert dict(model.named_modules()) == modules and bits_of(model) == bits  # modules are compared by identity
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert torch.equal(answer(model, x), scores)
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in trained.items())
    model(x).sum().backward()  # nothing of it was made in inference mode
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_widths_above_the_current_one(fragile: Net) -> None:
    model, teacher, x = fragile
    set_bits(model, {"first": 8, "second": FLOAT})
    measured = measure_sensitivity(model, teacher, [x], task="segment")
    assert {name: tuple(entry.gains) for name, entry in measured.items()} == {"first": (FLOAT,), "third": WIDER, "fourth": WIDER}


def test_equal_teacher(fragile: Net) -> None:
    model, _, x = fragile
    measured = measure_sensitivity(model, copy.deepcopy(model), [x], task="segment")
    assert all(set(entry.gains.values()) == {0.0} for entry in measured.values())
    assert set(assign_bits(measured, 16).values()) == {4}


# ---- choosing ----


@st.composite
def sensitivities(draw: st.DrawFn) -> dict[str, Sensitivity]:
    """Up to six layers of 2 to 8 bits with gains that are positive, small or negative."""
    layers = {}
    for number in range(draw(st.integers(1, 6))):
        bits = draw(st.integers(2, 8))
        gains = {width: draw(st.one_of(st.floats(-0.5, 1), st.floats(-2 * LEAST, 2 * LEAST))) for width in WIDER if width > bits}
        layers[f"layer{number}"] = Sensitivity(bits=bits, weights=draw(st.integers(1, 100)), gains=gains)
    return layers


def average(layers: dict[str, Sensitivity], bits: dict[str, int]) -> float:
    weights = sum(layer.weights for layer in layers.values())
    return sum(STORED.get(bits[name], bits[name]) * layer.weights for name, layer in layers.items()) / weights


def now(layers: dict[str, Sensitivity]) -> dict[str, int]:
    return {name: layer.bits for name, layer in layers.items()}


def key(layer: Sensitivity) -> set[int]:
    """The allowed widths of a layer, by the definition."""
    useful = {width for width, gain in layer.gains.items() if gain >= LEAST}
    return useful - ({FLOAT} if 8 in useful and layer.gains.get(FLOAT, 0.0) < BETTER * layer.gains[8] else set())


@given(sensitivities(), st.floats(0, 1))
def test_average_and_widths(layers: dict[str, Sensitivity], at: float) -> None:
    least = average(layers, now(layers)) + 1e-6  # what a float loses of a whole number of bits
    budget = least + at * (16 - least)
    bits = assign_bits(layers, budget)
    assert list(bits) == list(layers)
    assert average(layers, bits) <= budget
    for name, layer in layers.items():
        assert bits[name] == layer.bits or bits[name] in key(layer)


@given(sensitivities())
def test_unlimited_budget(layers: dict[str, Sensitivity]) -> None:
    bits = assign_bits(layers, 16)
    for name, layer in layers.items():
        best = max((layer.gains[width] for width in key(layer)), default=None)
        assert (bits[name] == layer.bits) if best is None else (layer.gains[bits[name]] == best)


@given(sensitivities(), st.floats(2, 16), st.floats(2, 16))
def test_rising_budgets(layers: dict[str, Sensitivity], one: float, other: float) -> None:
    least = average(layers, now(layers)) + 1e-6
    gained = []
    for budget in sorted((one, other)):
        bits = assign_bits(layers, max(least, budget))
        gained.append(sum(layer.gains.get(bits[name], 0.0) for name, layer in layers.items()))
    assert gained[1] >= gained[0] - 1e-9


def layer(eight: float, float_: float, bits: int = 4, weights: int = 100) -> dict[str, Sensitivity]:
    return {"layer": Sensitivity(bits=bits, weights=weights, gains={8: eight, FLOAT: float_})}


@pytest.mark.parametrize(
    ("eight", "floating", "expected"),
    [
        (0.5, 0.5, 8),
        (0.5, 0.5 * BETTER * 0.99, 8),  # not enough better for twice the bytes
        (0.5, 0.5 * BETTER * 1.01, FLOAT),
        (LEAST * 0.99, LEAST * 0.99, 4),
        (LEAST * 1.01, LEAST * 1.01, 8),
        (LEAST * 0.99, LEAST * 1.01, FLOAT),  # 8 bits do not help, floats do
        (-0.3, -0.1, 4),
    ],
)
def test_widths_with_little_gain(eight: float, floating: float, expected: int) -> None:
    assert assign_bits(layer(eight, floating), 16) == {"layer": expected}


def test_cost_of_floats() -> None:
    assert assign_bits(layer(0.1, 0.9), 16)["layer"] == FLOAT
    assert assign_bits(layer(0.1, 0.9), 15.9)["layer"] == 8
    assert assign_bits(layer(0.1, 0.9), 7.9)["layer"] == 4


def test_cost_of_other_float_layers() -> None:
    layers = {"layer": Sensitivity(bits=4, weights=100, gains={8: 0.5})}
    assert [assign_bits(layers, average, floats=100)["layer"] for average in (12, 11.9, 10, 5)] == [8, 4, 4, 4]
    assert assign_bits({}, 4, floats=100) == {}


def test_gain_by_cost() -> None:
    layers = {
        "large": Sensitivity(bits=4, weights=900, gains={8: 0.5}),
        "small": Sensitivity(bits=4, weights=100, gains={8: 0.2}),
    }
    assert assign_bits(layers, 4.4) == {"large": 4, "small": 8}
    assert assign_bits(layers, 8) == {"large": 8, "small": 8}


def test_average_out_of_reach() -> None:
    with pytest.raises(MuntinError, match=r"average_bits 3\.9 is out of reach: the layers have 4 already") as caught:
        assign_bits(layer(0.5, 0.9), 3.9)
    assert "\n" not in str(caught.value)
