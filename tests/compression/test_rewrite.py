"""Finding and replacing layers, shared ones included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from muntin.compression import Pass, QuantizedLinear, freeze, low_rank, prepare_qat, quantize
from muntin.compression.factored import FactoredLinear
from muntin.compression.rewrite import is_kept, named, number_paddings, replace
from muntin.training.config import LowRankConfig


class Shared(nn.Module):
    """One layer under two names, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.alias = self.first
        self.inner = nn.Sequential(nn.ReLU(), self.first, nn.Conv2d(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](self.alias(self.first(x)))  # type: ignore[no-any-return]


def test_each_layer_is_named_once_by_its_first_name() -> None:
    assert [name for name, _ in named(Shared(), nn.Linear)] == ["first"]
    assert [name for name, _ in named(Shared(), nn.Linear, nn.Conv2d)] == ["first", "inner.2"]
    assert [name for name, _ in named(nn.Linear(2, 2), nn.Linear)] == [""]
    assert list(named(Shared(), nn.Embedding)) == []


@pytest.mark.parametrize("pass_", [quantize([torch.rand(2, 3, 8, 8)]), prepare_qat([torch.rand(2, 3, 8, 8)])])
def test_a_layer_that_is_the_whole_model_is_kept_and_told(pass_: Pass) -> None:
    changes = pass_(nn.Conv2d(3, 8, 3))
    assert [(change.layer, change.reason) for change in changes if change.pass_ != "fold"] == [
        ("", "it is the whole model: put it into an nn.Sequential")
    ]


def test_a_shared_layer_is_replaced_under_all_of_its_names() -> None:
    model = Shared()
    other = nn.Linear(4, 4)
    replace(model, "inner.1", other)
    assert model.first is other and model.alias is other and model.inner[1] is other
    x = torch.randn(2, 4)
    assert torch.equal(model(x), other(other(other(x))))


class Held(nn.Module):
    """Layers that plain lists, tuples and dicts hold too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.path: list[nn.Module] = [self.first, self.other, self.first]
        self.nested: dict[str, Any] = {"both": (self.other, [self.first]), "one": self.first, "none": {"size": 4}}
        self.rest = (self.other, 4)


def test_a_layer_is_replaced_in_plain_lists_tuples_and_dicts_which_stay_the_same_objects() -> None:
    model, new = Held(), nn.Linear(4, 4)
    path, nested, rest = model.path, model.nested, model.rest
    inner = nested["both"][1]
    replace(model, "first", new)
    assert model.first is new and model.path is path and path == [new, model.other, new]
    assert model.nested is nested and nested == {"both": (model.other, [new]), "one": new, "none": {"size": 4}}
    assert nested["both"][1] is inner and model.rest is rest


class Versioned(NamedTuple):
    number: int
    layer: nn.Module


class Through(nn.Sequential):
    """A chain that goes through a plain list of its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._path = list(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._path:
            x = layer(x)
        return x


@pytest.mark.parametrize("make", [quantize, prepare_qat, partial(low_rank, config=LowRankConfig(parameters=0.8, multiple=1))])
def test_a_model_that_goes_through_a_plain_list_computes_with_its_new_layers(make: Callable[[list[Tensor]], Pass]) -> None:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    listed, plain = Through(*copy.deepcopy(layers)).eval(), nn.Sequential(*layers).eval()
    images = torch.randint(0, 256, (4, 3, 16, 16))
    x = images.float()
    before = plain(x).detach()
    assert make([images])(listed) == make([images])(plain)
    with torch.no_grad():
        after = plain.eval()(x)
        assert torch.equal(listed.eval()(x), after) and not torch.allclose(after, before)


def test_named_tuples_and_lists_that_hold_themselves_are_gone_through() -> None:
    model, new = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    endless: list[Any] = [model[0]]
    endless.append(endless)
    model.endless, model.version = endless, Versioned(1, model[0])  # type: ignore[assignment]
    replace(model, "0", new)
    assert model.endless is endless and endless[0] is new
    assert model.version == Versioned(1, new)


def test_the_new_layer_takes_the_mode_of_the_old() -> None:
    model = Shared().eval()
    replace(model, "first", nn.Sequential(nn.Dropout(), nn.Linear(4, 4)))
    assert not any(module.training for module in model.modules())


def test_only_the_named_layer_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[0]
    replace(model, "1", nn.Identity())
    assert model[0] is kept and isinstance(model[1], nn.Identity)


def upsampler() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, stride=2), nn.Conv2d(16, 4, 1))


@pytest.mark.parametrize("make", [quantize, prepare_qat, partial(low_rank, config=LowRankConfig(parameters=1.0))])
def test_a_kind_that_no_pass_rewrites_is_told(make: Callable[[list[Tensor]], Pass]) -> None:
    model = upsampler()
    changes = make([torch.randint(0, 256, (4, 3, 16, 16))])(model)
    told = [change for change in changes if change.layer == "2"]
    assert [change.kept for change in told] == [True]
    assert told[0].reason.startswith("ConvTranspose2d: no ")
    assert type(model.get_submodule("2")) is nn.ConvTranspose2d


@pytest.mark.parametrize("make", [quantize, lambda images: lambda model: prepare_qat(images)(model) + freeze(images)(model)])
def test_a_kind_that_no_pass_rewrites_takes_16_bits_all_the_same(make: Callable[[list[Tensor]], Pass]) -> None:
    model = upsampler()
    make([torch.randint(0, 256, (4, 3, 16, 16))])(model)
    weight = model.get_parameter("2.weight")
    assert torch.equal(weight, weight.half().float())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_paddings_are_written_as_numbers_where_there_are_such() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, 2, padding="valid"),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same", dilation=2),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    x = torch.rand(2, 3, 16, 17)
    before = model(x)
    changes = number_paddings(model)
    assert torch.equal(model(x), before)
    assert {change.layer: change.done for change in changes} == {
        "0": "padding 'same' written as 2 x 2",
        "2": "padding 'valid' written as 0 x 0",
        "4": "padding 'same' written as 1 x 1",
    }
    assert [layer.padding for layer in model] == [(2, 2), "same", (0, 0), "same", (1, 1), (1, 1)]
    assert number_paddings(model) == []


@pytest.mark.parametrize("make", [quantize, prepare_qat, partial(low_rank, config=LowRankConfig(parameters=0.8, multiple=1))])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolution_whose_padding_is_a_word_is_rewritten(make: Callable[[list[Tensor]], Pass], padding: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=padding), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=padding))
    changes = [change for change in make([torch.randint(0, 256, (4, 3, 16, 16))])(model) if change.layer == "2"]
    assert [(change.pass_, change.kept) for change in changes] == [("pad", False), (changes[-1].pass_, False)]
    assert type(model[2]) is not nn.Conv2d


def test_keep_names_layers_modules_and_parts_of_layers() -> None:
    for entry in ("a.b", "a", "a.b.reduce"):
        assert is_kept("a.b", (entry,)) and not is_kept("ab.b", (entry,))
    assert not is_kept("a.b", ("a.b.nosuch",)) and not is_kept("", ("a", "reduce"))


def test_hooks_go_on_with_the_new_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen: list[str] = []
    model[0].register_forward_hook(lambda layer, inputs, output: output + 1)
    model[0].register_forward_pre_hook(lambda layer, inputs, by_name: seen.append(type(layer).__name__), with_kwargs=True)
    x = torch.randn(2, 4)
    due = model(x)
    replace(model, "0", nn.Sequential(model[0].__class__(4, 4)))
    with torch.no_grad():
        model[0][0].weight.zero_()
        model[0][0].bias.zero_()
    assert torch.equal(model(x), torch.ones(2, 4)) and due.shape == (2, 4)
    assert seen == ["Linear", "Sequential"]


class Padding(nn.Conv2d):
    """Pads odd sides to even ones, as some checkpoints' convolutions do: of even ones it is a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        H, W = input.shape[-2:]
        return super().forward(nn.functional.pad(input, (0, W % 2, 0, H % 2), value=1.0))


class Renamed(nn.Conv2d):
    """A convolution."""


@pytest.mark.parametrize("pass_", [quantize([torch.rand(2, 3, 16, 16) * 255]), prepare_qat([torch.rand(2, 3, 16, 16) * 255])])
def test_a_convolution_that_pads_odd_sides_only_stays(pass_: Pass) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Renamed(3, 16, 3, padding=1), nn.ReLU(), Padding(16, 16, 2, stride=2)).eval()
    changes = {change.layer: change for change in pass_(model)}
    assert not changes["0"].kept and changes["2"].kept
    assert "does not compute what its kind does" in (changes["2"].reason or "") and isinstance(model[2], Padding)


class Alias(nn.Module):
    """Holds its layer under a name of its own and computes by another, which PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        object.__setattr__(self, "alias", self.fc)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.alias(x.mean((2, 3)) / 255)
        return out


def test_a_layer_that_is_held_by_a_plain_attribute_is_replaced_there_too() -> None:
    model, images = Alias().eval(), torch.randint(0, 256, (8, 64, 4, 4)).float()
    quantize([images])(model)
    assert isinstance(model.fc, QuantizedLinear) and model.alias is model.fc
    model = Alias().eval()
    low_rank([images], LowRankConfig(parameters=0.6))(model)
    assert isinstance(model.fc, FactoredLinear) and model.alias is model.fc
