"""Behaviour that quantize, prepare_qat and low_rank share. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from model_helpers import answer, pixels
from muntin import create_model
from muntin.compression import Change, QuantizedConv2d, freeze, prepare_qat, quantize
from muntin.compression.low_rank.factorization import low_rank
from muntin.compression.quantization.fake_quantization import sqnr_db
from muntin.compression.quantization.qat import QATConv2d
from muntin.errors import MuntinError
from muntin.layers import Product, SoftmaxProduct

INTEGER = ["quantize", "qat"]
ALL = [*INTEGER, "low_rank"]
SMALL = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}


def run_pass(name: str, model: nn.Module, batches: Iterable[Tensor], *, parameters: float = 0.8, **names: tuple[str, ...]) -> list[Change]:
    if name == "quantize":
        return quantize(model, batches, bits=7, **names)  # type: ignore[arg-type]
    if name == "qat":
        return prepare_qat(model, batches, bits=8, **names)  # type: ignore[arg-type]
    return low_rank(model, batches, parameters=parameters, multiple=1, **names)  # type: ignore[arg-type]


def apply(name: str, model: nn.Module, batches: Iterable[Tensor], **options: Any) -> dict[str, Change]:
    """Apply a pass; return its own changes by layer."""
    changes = [change for change in run_pass(name, model, batches, **options) if change.pass_ == name]
    assert len({change.layer for change in changes}) == len(changes)
    return {change.layer: change for change in changes}


def kept(changes: dict[str, Change]) -> dict[str, str]:
    return {name: change.reason for name, change in changes.items() if change.kept}


class Perceptron(nn.Module):
    """Three Linears over the channels of raw pixels, and parts that are not called."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        for name, part in more.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first((x / 64 - 2).permute(0, 2, 3, 1)))))
        out: Tensor = self.third(hidden).permute(0, 3, 1, 2)
        return out


# Calibration


@pytest.mark.parametrize("name", ALL)
def test_no_batch(name: str) -> None:
    nothings: list[Iterable[Tensor]] = [[], iter(())]
    for nothing in nothings:
        with pytest.raises(MuntinError, match="there is no batch"):
            run_pass(name, Perceptron(), nothing)


@pytest.mark.parametrize("name", INTEGER)
def test_batches_without_images(name: str) -> None:
    assert len(kept(apply(name, Perceptron().eval(), [torch.zeros(0, 3, 8, 8)]))) == 3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_not_finite(name: str, bad: float) -> None:
    model = Perceptron().eval()
    with torch.no_grad():
        model.second.weight[3, 2] = bad
    with pytest.raises(MuntinError, match=r"layer 'second': the weight holds NaN or infinity") as caught:
        run_pass(name, model, [pixels(1, 3, 8, 8)])
    assert "\n" not in str(caught.value) and type(model.second) is nn.Linear


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_image_not_finite(name: str, bad: float) -> None:
    model, x = Perceptron().eval(), pixels(2, 3, 8, 8)
    x[1, 0, 3, 3] = bad
    with pytest.raises(MuntinError, match=r"NaN or infinity at the input of layer 'first'") as caught:
        run_pass(name, model, [x])
    assert "\n" not in str(caught.value) and all(type(layer) is nn.Linear for layer in model.children())


@pytest.mark.parametrize("name", INTEGER)
def test_one_pixel(name: str) -> None:
    model = Perceptron().eval()
    assert len(apply(name, model, [pixels(1, 3, 1, 1)])) == 3
    x = pixels(2, 3, 9, 9)
    before = answer(model, x)
    assert torch.isfinite(before).all()
    if name == "qat":
        freeze(model, [pixels(1, 3, 1, 1)])
        torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INTEGER)
def test_constant_activations(name: str) -> None:
    model, x = Perceptron().eval(), pixels(2, 3, 8, 8)
    with torch.no_grad():
        model.first.bias.fill_(-1e4)  # ReLU gives zeros
        model.second.weight.zero_()  # only the bias reaches the third layer
    before = answer(model, x)
    assert not apply(name, model, [x])["second"].kept
    torch.testing.assert_close(answer(model, x), before, rtol=0.02, atol=0.02 * float(before.abs().max()))
    if name == "qat":
        model(x).square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        trained = answer(model, x)
        freeze(model, [x])
        torch.testing.assert_close(answer(model, x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INTEGER)
def test_calibration_types(name: str) -> None:
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    one, other = Perceptron().eval(), Perceptron().eval()
    other.load_state_dict(one.state_dict())
    apply(name, one, [x.float()])
    apply(name, other, (batch for batch in (x,)))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


# The setting `keep`


@pytest.mark.parametrize("name", ALL)
def test_unknown_name_in_keep(name: str) -> None:
    model = create_model("hybrid-xs", options=SMALL).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MuntinError, match=r"keep names no layer: nosuch; the model has stem\.0\.conv") as caught:
        run_pass(name, model, [pixels(1, 3, 32, 32)], keep=("stem.0.conv", "nosuch"))
    assert "\n" not in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", INTEGER)
def test_layers_in_keep(name: str) -> None:
    model = Perceptron().eval()
    second = model.second
    assert kept(apply(name, model, [pixels(1, 3, 8, 8)], keep=("second",))) == {"second": "named in keep"}
    assert model.second is second
    assert name == "qat" or torch.equal(second.weight, second.weight.half().float())


# Layers without another form


@pytest.mark.parametrize("name", ALL)
def test_layer_without_images(name: str) -> None:
    model = Perceptron(spare=nn.Conv2d(3, 3, 1), product=Product(), attention=SoftmaxProduct()).eval()
    changes = apply(name, model, [pixels(1, 3, 8, 8)])
    spare = ("spare", "product", "attention") if name == "qat" else ("spare",)
    assert {part: kept(changes)[part] for part in spare} == dict.fromkeys(spare, "no calibration image reached it")
    assert changes["spare"].sqnr_db is None and isinstance(model.spare, nn.Conv2d)


@pytest.mark.parametrize("name", ALL)
def test_layer_that_is_the_whole_model(name: str) -> None:
    changes = apply(name, nn.Conv2d(3, 8, 3).eval(), [torch.rand(2, 3, 8, 8)])
    assert kept(changes) == {"": "it is the whole model: put it into an nn.Sequential"}


class Doubling(nn.Conv2d):
    """Computes something else than its kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Verbose(nn.Conv2d):
    """Computes a convolution in a `forward` of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias)


@pytest.mark.parametrize("name", INTEGER)
def test_layers_with_own_arithmetic(name: str) -> None:
    model = nn.Sequential(Doubling(3, 8, 2), Verbose(8, 4, 1)).eval()
    x = pixels(1, 3, 16, 16)
    before = answer(model, x)
    assert kept(apply(name, model, [x])) == {"0": "it does not compute what its kind does: no integer form"}
    assert sqnr_db(before, answer(model, x)) > 30


class PadsOddSides(nn.Conv2d):
    """Pads odd sides to even ones."""

    def forward(self, input: Tensor) -> Tensor:
        H, W = input.shape[-2:]
        return super().forward(F.pad(input, (0, W % 2, 0, H % 2), value=1.0))


class Renamed(nn.Conv2d):
    """A convolution."""


@pytest.mark.parametrize("name", INTEGER)
def test_convolution_that_pads_odd_sides(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Renamed(3, 16, 3, padding=1), nn.ReLU(), PadsOddSides(16, 16, 2, stride=2)).eval()
    assert kept(apply(name, model, [torch.rand(2, 3, 16, 16) * 255])) == {"2": "it does not compute what its kind does: no integer form"}
    assert isinstance(model[2], PadsOddSides)


@pytest.mark.parametrize("name", INTEGER)
def test_computed_weight(name: str) -> None:
    """A computed weight must not be replaced: a checkpoint holds the parameters that it is computed from."""
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(normed, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    x, names = pixels(2, 3, 8, 8), list(model.state_dict())
    before = answer(model, x)
    assert kept(apply(name, model, [x])) == {"0": "its weight is computed (weight norm, spectral norm): remove that first"}
    assert model[0] is normed and set(names[:3]) <= model.state_dict().keys()
    assert isinstance(model[1], nn.BatchNorm2d) and sqnr_db(before, answer(model, x)) > 15


@pytest.mark.parametrize("name", ALL)
def test_kind_that_no_pass_rewrites(name: str) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(16, 16, 2, stride=2)
    model, images = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), up, nn.Conv2d(16, 4, 1)), pixels(4, 3, 16, 16)
    assert kept(apply(name, model, [images], parameters=1.0))["2"].startswith("ConvTranspose2d: no ")
    assert model[2] is up
    if name == "qat":
        freeze(model, [images])
    assert name == "low_rank" or torch.equal(up.weight, up.weight.half().float())


# How a model holds and calls its layers


@pytest.mark.parametrize("name", INTEGER)
def test_shared_layer(name: str) -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared).eval()
    x = pixels(1, 3, 8, 8)
    assert list(apply(name, model, [x])) == ["0", "1"]
    assert isinstance(model[1], QATConv2d if name == "qat" else QuantizedConv2d) and model[3] is model[1]
    if name == "qat":
        freeze(model, [x])
        assert isinstance(model[1], QuantizedConv2d) and model[3] is model[1]


class Through(nn.Sequential):
    """Calls its layers from a plain list."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._path = list(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._path:
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ALL)
def test_layers_in_a_plain_list(name: str) -> None:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    listed, plain = Through(*copy.deepcopy(layers)).eval(), nn.Sequential(*layers).eval()
    images = pixels(4, 3, 16, 16)
    before = answer(plain, images)
    assert apply(name, listed, [images]) == apply(name, plain, [images])
    after = answer(plain, images)
    assert torch.equal(answer(listed, images), after) and not torch.allclose(after, before)


class Alias(nn.Module):
    """Calls its layer by an attribute that PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        object.__setattr__(self, "alias", self.fc)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.alias(x.mean((2, 3)) / 255)
        return out


@pytest.mark.parametrize("name", ALL)
def test_layer_in_a_plain_attribute(name: str) -> None:
    model = Alias().eval()
    apply(name, model, [pixels(8, 64, 4, 4)], parameters=0.6)
    assert type(model.fc) is not nn.Linear and model.alias is model.fc


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_given_as_a_word(name: str, padding: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=padding), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=padding)).eval()
    changes = [change for change in run_pass(name, model, [pixels(4, 3, 16, 16)]) if change.layer == "2"]
    assert [(change.pass_, change.kept) for change in changes][:2] == [("pad", False), (name, False)]
    assert type(model[2]) is not nn.Conv2d
