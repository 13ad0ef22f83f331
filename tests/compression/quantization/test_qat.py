"""Quantisation-aware training: operations against integers in float64, networks against their frozen forms, errors.

Axes: B images, C channels, H W map, O output and I input channels, N entries of a softmax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from model_helpers import answer, by_layer, names, pixels, settled
from muntin import create_model
from muntin.compression import fold, freeze, prepare_qat, quantize, set_bits
from muntin.compression.low_rank.factorization import low_rank
from muntin.compression.quantization.fake_quantization import along, sqnr_db
from muntin.compression.quantization.qat import (
    FLOAT,
    LearnedGrid,
    QATConv2d,
    QATLinear,
    QATProduct,
    QATSoftmaxProduct,
    apply_qat,
    qat_operations,
    qat_structure,
)
from muntin.compression.quantization.quantized_layers import (
    MAX_ENTRIES,
    InputGrid,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedProduct,
    QuantizedSoftmaxProduct,
    exponentials,
)
from muntin.deployment import export
from muntin.errors import MuntinError
from muntin.graph.grids import ByteGrid, RangeObserver, usable
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import TrainedRecord

SMALL = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}
WEIGHTED = (nn.Linear, nn.Conv2d)
QAT = (QATLinear, QATConv2d, QATProduct, QATSoftmaxProduct)
FROZEN = (QuantizedLinear, QuantizedConv2d, QuantizedProduct, QuantizedSoftmaxProduct)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "hybrid": lambda: create_model("hybrid-xs", classes=4, options=SMALL),
    "convnet of timm": lambda: create_model("timm:mobilenetv3_small_050", task="classify", classes=4),
}


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: layer.bits for name, layer in model.named_modules() if isinstance(layer, QATLinear | QATConv2d)}


def grid_of(x: Tensor) -> ByteGrid:
    observer = RangeObserver()
    observer.see_range(float(x.min()), float(x.max()))
    observer.see_values(x.detach().numpy())
    return observer.grid()


def grid_at(scale: float, *, unsigned: bool, zero_point: int = 0) -> ByteGrid:
    return ByteGrid(scale=scale, unsigned=unsigned, zero_point=zero_point if unsigned else 0)


GRIDS = st.builds(grid_at, st.floats(1e-3, 10), unsigned=st.booleans(), zero_point=st.sampled_from([0, 0, 14, 128, 254]))
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**16)


class Perceptron(nn.Module):
    """Three Linears over the channels of raw pixels."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        for name, part in more.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first((x / 64 - 2).permute(0, 2, 3, 1)))))
        out: Tensor = self.third(hidden).permute(0, 3, 1, 2)
        return out


# ---- whole networks ----


@pytest.mark.parametrize("name", MODELS)
def test_all_operations_are_prepared(name: str) -> None:
    model, x = MODELS[name](), pixels(4, 3, 32, 32)
    settled(model, x)
    layers, products = names(model, *WEIGHTED), names(model, Product, SoftmaxProduct)
    changes = by_layer(prepare_qat(model, [x], bits=4), "qat")
    assert sorted(changes) == sorted([*layers, *products])
    assert sorted(qat_operations(model)) == sorted(changes) == sorted(names(model, *QAT))
    assert {changes[layer].done for layer in layers} == {"W4A8"} and {changes[product].done for product in products} <= {"A8"}
    assert not names(model, *WEIGHTED, Product, SoftmaxProduct)
    assert bits_of(model) == dict.fromkeys(layers, 4)
    assert bool(products) == (name == "hybrid")
    assert any(isinstance(module, QATConv2d) and module.weight.shape[1] == 1 for module in model.modules())  # depthwise


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_model_against_trained(name: str, bits: int) -> None:
    model, x = MODELS[name](), pixels(2, 3, 32, 32)
    settled(model, x)
    exact = answer(model, x)
    prepare_qat(model, [x], bits=bits)
    trained = answer(model, x)
    structure = qat_structure(model)
    changes = by_layer(freeze(model, [x]), "quantize")
    deployed = answer(model, x)
    assert sorted(names(model, *FROZEN)) == sorted(structure) == sorted(changes)
    assert not names(model, *QAT)
    noise = (trained - exact).square().mean().sqrt()  # of quantisation, of which what freezing adds is next to nothing
    assert 0 < noise < float("inf")
    assert (deployed - trained).square().mean().sqrt() < 0.1 * noise  # a Linear's sum has another order now, and may tip a value over


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-4, 100), st.booleans(), st.sampled_from([0, 14, 254]), SEEDS)
@example(1.0, False, 0, 0)
def test_half_way_values(scale: float, unsigned: bool, zero_point: int, seed: int) -> None:
    torch.manual_seed(seed)
    grid = LearnedGrid(grid_at(usable(scale), unsigned=unsigned, zero_point=zero_point))
    step = grid.log_scale.detach().exp()
    x = (torch.randint(-260, 260, (500,)) + 0.5) * step
    assert torch.equal(grid(x).detach(), InputGrid(grid.frozen())(x))


def test_error_by_bits() -> None:
    model, x = MODELS["hybrid"](), pixels(2, 3, 32, 32)
    settled(model, x)
    exact = answer(model, x)
    kept = []
    for bits in (2, 4, 8):
        trained = copy.deepcopy(model)
        prepare_qat(trained, [x], bits=bits)
        kept.append(sqnr_db(exact, answer(trained, x)))
    assert kept[0] < kept[1] < kept[2] and kept[2] > 25


def test_gradients_of_weights_and_scales() -> None:
    model, x = MODELS["hybrid"](), pixels(2, 3, 32, 32)
    settled(model, x)
    prepare_qat(model, [x])
    model.train()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for name, operation in qat_operations(model).items():
        grids = [module for module in operation.modules() if isinstance(module, LearnedGrid)]
        assert len(grids) == (2 if isinstance(operation, QATProduct) else 1)
        learned: dict[str, nn.Parameter] = {f"grid {n}": grid.log_scale for n, grid in enumerate(grids)}
        if isinstance(operation, QATLinear | QATConv2d):
            learned |= {"weight": cast(nn.Parameter, operation.weight), "scale": operation.log_scale}
        for kind, parameter in learned.items():
            assert parameter.grad is not None and parameter.grad.any(), f"{name}: {kind}"


def test_training_recovers_two_bits() -> None:
    model, x = Perceptron().eval(), pixels(4, 3, 8, 8)
    exact = answer(model, x).clone()
    prepare_qat(model, [x], bits=2)
    before = (answer(model, x) - exact).square().mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - exact).square().mean().backward()
        optimizer.step()
    freeze(model, [x])
    assert (answer(model, x) - exact).square().mean() < before / 2


def test_autocast() -> None:
    model, x = MODELS["hybrid"](), pixels(2, 3, 32, 32)
    settled(model, x)
    prepare_qat(model, [x], bits=8)
    single = answer(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
    assert sqnr_db(single, scores.detach().float()) > 15
    scores.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


# ---- one operation ----


def away_from_borders(shape: Iterable[int], low: int, high: int) -> tuple[Tensor, Tensor]:
    """Levels inside and outside of a grid, and values in steps that round to them even with float errors."""
    levels = torch.randint(low - 9, high + 10, tuple(shape)).double()
    return levels.clamp(low, high), levels + torch.rand(tuple(shape)).double() * 0.9 - 0.45


def settle_weight(layer: QATLinear | QATConv2d) -> Tensor:
    """Set a weight away from the borders of its levels; return the rounded weight in float64."""
    limit = 2 ** (layer.bits - 1) - 1
    q, v = away_from_borders(layer.weight.shape, -limit, limit)
    scale = along(layer.log_scale.detach().exp(), layer.weight.ndim, 0)
    with torch.no_grad():
        layer.weight.copy_(v * scale)
    return q * scale


def inputs_of(grid: ByteGrid, *shape: int) -> tuple[Tensor, Tensor]:
    """Inputs `(*shape)`, and their rounded values in float64."""
    q, v = away_from_borders(shape, *grid.levels)
    scale = float(torch.tensor(grid.scale, dtype=torch.float32).log().exp())
    return (v * scale).float(), q * scale


def assert_as_deployed(layer: Any, x: tuple[Tensor, ...], expected: Tensor, magnitude: Tensor) -> None:
    frozen = layer.frozen().eval()
    for form in (layer, frozen):
        out = form(*x).detach().double()
        assert out.shape == expected.shape
        assert bool(((out - expected).abs() <= 1e-5 * magnitude + 1e-9).all()), type(form).__name__
    assert not list(frozen.parameters())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 9), st.integers(1, 9), BITS, st.booleans(), GRIDS, SEEDS)
def test_linear_against_integers(lead: list[int], inputs: int, outputs: int, bits: int, bias: bool, grid: ByteGrid, seed: int) -> None:
    torch.manual_seed(seed)
    layer = QATLinear(nn.Linear(inputs, outputs, bias=bias), grid, bits)
    weight_OI = settle_weight(layer)
    x, rounded = inputs_of(grid, *lead, inputs)
    shift = 0 if layer.bias is None else layer.bias.detach().double()
    assert_as_deployed(layer, (x,), F.linear(rounded, weight_OI) + shift, F.linear(rounded.abs(), weight_OI.abs()) + 1)
    assert int(layer.frozen().integers.abs().max()) <= 2 ** (bits - 1) - 1


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([(1, 3, 5), (2, 4, 6), (4, 4, 4), (4, 4, 8)]),  # groups, input and output channels
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    padding=st.sampled_from([(0, 0), (1, 1), (2, 0)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    bits=BITS,
    bias=st.booleans(),
    grid=GRIDS,
    seed=SEEDS,
)
def test_convolution_against_integers(
    groups: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    bits: int,
    bias: bool,
    grid: ByteGrid,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    count, inputs, outputs = groups
    layer = QATConv2d(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, count, bias), grid, bits)
    weight_OIHW = settle_weight(layer)
    x, rounded = inputs_of(grid, 2, inputs, *size)
    shift = 0 if layer.bias is None else layer.bias.detach().double().reshape(-1, 1, 1)
    how = (None, stride, padding, dilation, count)
    expected = F.conv2d(rounded, weight_OIHW, *how) + shift
    assert_as_deployed(layer, (x,), expected, F.conv2d(rounded.abs(), weight_OIHW.abs(), *how) + 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), GRIDS, GRIDS, SEEDS)
def test_product_against_integers(heads: int, rows: int, between: int, columns: int, left: ByteGrid, right: ByteGrid, seed: int) -> None:
    torch.manual_seed(seed)
    (a, rounded_a), (b, rounded_b) = inputs_of(left, heads, rows, between), inputs_of(right, heads, between, columns)
    layer = QATProduct(left, right)
    assert_as_deployed(layer, (a, b), rounded_a @ rounded_b, rounded_a.abs() @ rounded_b.abs())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), GRIDS, st.booleans(), SEEDS)
def test_softmax_product_against_integers(rows: int, entries: int, columns: int, grid: ByteGrid, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    levels_RN, steps_RN = away_from_borders((rows, entries), 0, 255)
    levels_RN[:, 0], steps_RN[:, 0] = 255, 255  # the largest logit, whose exponential is 1
    logits_RN = (steps_RN.clamp(0.01, 255) / 255).log()
    bias_RN = torch.randn(rows, entries).double() if biased else torch.zeros(rows, entries).double()
    values, rounded = inputs_of(grid, entries, columns)
    expected = levels_RN @ rounded / levels_RN.sum(-1, keepdim=True)
    x = ((logits_RN - bias_RN).float(), values, bias_RN.float() if biased else None)
    assert_as_deployed(QATSoftmaxProduct(grid), x, expected, rounded.abs().amax(0).expand_as(expected))  # type: ignore[arg-type]


# ---- softmax ----

ENTRIES = (16, 256, 4096, 16384)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_softmax_error_by_entries(spread: float) -> None:
    errors, vanished = {}, {}
    for entries in ENTRIES:
        torch.manual_seed(entries)
        logits_RN, values_ND = spread * torch.randn(32, entries), 1 + torch.randn(entries, 8)
        product = QATSoftmaxProduct(grid_of(values_ND))
        shares_RN = torch.softmax(logits_RN, -1)
        exact_RD = shares_RN @ values_ND
        size = exact_RD.square().mean().sqrt()
        errors[entries] = float((product(logits_RN, values_ND) - exact_RD).detach().square().mean().sqrt() / size)
        plain_RN = (shares_RN * 255).round() / 255  # the softmax itself on the grid of its range 0..1
        vanished[entries] = float((plain_RN @ values_ND - exact_RD).square().mean().sqrt() / size)
    assert max(errors.values()) < 0.1
    assert errors[16384] < 3 * max(errors[16], 0.005)
    assert vanished[16384] > 0.5 and vanished[16384] > 10 * errors[16384]


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("value", [0.3, -40.0])
def test_softmax_weights_sum_to_one(entries: int, value: float) -> None:
    logits_RN, values_ND = 3 * torch.randn(4, entries), torch.full((entries, 2), value)
    product = QATSoftmaxProduct(grid_of(values_ND))
    for form in (product, product.frozen()):
        torch.testing.assert_close(form(logits_RN, values_ND).detach(), torch.full((4, 2), value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("times", [1, 2, 6, 10, 50])
def test_softmax_sums_fit_32_bits(times: int) -> None:
    entries = times * MAX_ENTRIES
    logits_RN, values_ND = torch.zeros(1, entries), torch.full((entries, 1), 2.0)
    product = QATSoftmaxProduct(grid_of(torch.tensor([[0.0], [2.0]]))).frozen()
    shares = product.shares(exponentials(logits_RN, None)) * 255
    assert 255 * int(shares.round().long().sum()) < 2**31
    assert shares.min() == shares.max() >= 5
    torch.testing.assert_close(product(logits_RN, values_ND), torch.full((1, 1), 2.0), rtol=1e-2, atol=0)


def test_softmax_bias() -> None:
    logits_RN, values_ND = torch.randn(3, 20), torch.randn(20, 4)
    bias_1N = torch.zeros(1, 20)
    bias_1N[:, 8:] = -1e4
    product = QATSoftmaxProduct(grid_of(values_ND))
    for form in (product, product.frozen()):
        hidden = form(logits_RN, values_ND, bias_1N)
        torch.testing.assert_close(hidden, form(logits_RN[:, :8], values_ND[:8]))
        logits_RN[:, 8:], values_ND[8:] = 50.0, 3.0
        torch.testing.assert_close(form(logits_RN, values_ND, bias_1N), hidden)
        assert not torch.allclose(form(logits_RN, values_ND), hidden)


# ---- other widths ----


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_wider_layer_continues(bits: int) -> None:
    model, x = Perceptron().eval(), pixels(2, 3, 8, 8)
    prepare_qat(model, [x], bits=bits)
    second = model.second
    assert isinstance(second, QATLinear)
    with torch.no_grad():
        second.log_scale.add_(0.1)  # as training leaves it: not the scale that its weight would give
    rounded, before = second.rounded().detach(), answer(model, x)
    others = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("second.")}
    set_bits(model, {"first": bits, "second": 8})
    assert model.second is second and bits_of(model) == {"first": bits, "second": 8, "third": bits}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in others.items())
    step_O1 = second.log_scale.detach().exp()[:, None]  # of 8 bits
    assert ((second.rounded() - rounded).detach().abs() <= step_O1 / 2 * (1 + 1e-4)).all()
    assert sqnr_db(before, answer(model, x)) > 35
    assert by_layer(freeze(model, [x]), "quantize")["second"].done == "W8A8"


def test_float_layer_from_rounded_weight() -> None:
    model, x = create_model("hybrid-xs", options=SMALL), pixels(2, 3, 32, 32)
    settled(model, x)
    prepare_qat(model, [x])
    name = "stages.0.position.conv"  # depthwise
    layer = model.get_submodule(name)
    assert isinstance(layer, QATConv2d)
    rounded = layer.rounded().detach().clone()
    set_bits(model, {name: FLOAT})
    plain = model.get_submodule(name)
    assert type(plain) is nn.Conv2d and torch.equal(plain.weight, rounded) and plain.bias is layer.bias
    assert isinstance(plain.weight, nn.Parameter) and plain.weight.requires_grad and not plain.training
    like = layer.shape_of[0]
    assert isinstance(like, nn.Conv2d)
    assert (plain.stride, plain.padding, plain.groups) == (like.stride, like.padding, like.groups)
    assert name not in bits_of(model) and torch.isfinite(answer(model, x)).all()
    changes = by_layer(freeze(model, [x]), "quantize")
    assert (changes[name].done, changes[name].reason) == ("kept", "16 bits, as assigned")
    assert torch.equal(plain.weight, plain.weight.half().float())


def test_freeze_measures_sqnr() -> None:
    x, kept = pixels(2, 3, 8, 8), {}
    torch.manual_seed(1)
    model = Perceptron().eval()
    for bits in (2, 4, 8):
        trained = copy.deepcopy(model)
        prepare_qat(trained, [x], bits=bits)
        changes = by_layer(freeze(trained, [x]), "quantize")
        assert {change.done for change in changes.values()} == {f"W{bits}A8"}
        kept[bits] = [change.sqnr_db or 0 for change in changes.values()]
    assert all(two < four < eight for two, four, eight in zip(kept[2], kept[4], kept[8], strict=True))
    assert min(kept[8]) > 30 and max(kept[2]) < 20


# ---- structure, for checkpoints ----


def test_structure_round_trip() -> None:
    torch.manual_seed(3)
    model, x = create_model("hybrid-xs", options=SMALL), pixels(2, 3, 32, 32)
    settled(model, x)
    prepare_qat(model, [x], keep=("head.conv",))
    set_bits(model, {"stem.0.conv": 8, "stem.1.conv": FLOAT, "stages.0.blocks.0.mlp.expand": 2})
    structure = qat_structure(model)
    again = create_model("hybrid-xs", options=SMALL).eval()
    fold(again)
    apply_qat(again, structure)
    again.load_state_dict(model.state_dict())
    assert qat_structure(again) == structure and bits_of(again) == bits_of(model)
    assert structure["stem.0.conv"] == TrainedRecord(bits=8, unsigned=(False,))
    assert structure["stages.0.blocks.0.mlp.reduce"] == TrainedRecord(bits=4, unsigned=(True,))  # behind a ReLU
    assert structure["stages.0.blocks.0.attention.local.scores"] == TrainedRecord(bits=0, unsigned=(False, False))
    assert structure.keys().isdisjoint({"stem.1.conv", "head.conv"})
    assert torch.equal(answer(again, x), answer(model, x))
    for wrong in ({"nowhere": structure["stem.0.conv"]}, {"head.conv": TrainedRecord(bits=4, unsigned=(False, False))}):
        with pytest.raises(MuntinError, match=r"^qat: '.*: build the model that the checkpoint was made of$"):
            apply_qat(create_model("hybrid-xs", options=SMALL), wrong)


# ---- what goes wrong, and what is odd ----


@pytest.mark.parametrize("kept", ["stages.0.blocks.0.attention", "stages.0.blocks.0.attention.local.scores"])
def test_kept_module_with_products(kept: str) -> None:
    model = create_model("hybrid-xs", options=SMALL).eval()
    before = names(model, Product, SoftmaxProduct)
    prepare_qat(model, [pixels(1, 3, 32, 32)], keep=(kept,))
    assert names(model, Product, SoftmaxProduct) == [name for name in before if f"{name}.".startswith(f"{kept}.")] != []
    assert not any(name.startswith(kept) for name in qat_operations(model))
    assert any("attention" not in name for name in qat_operations(model))


class Equalised(nn.Module):
    """A foreign layer with a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 3) / 4)
        self.token = nn.Parameter(torch.zeros(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x / 64 - 2).movedim(1, 3), self.matrix * 0.7).movedim(3, 1) + self.token


def test_bare_weights() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 3))
    model, x = nn.Sequential(Equalised(), nn.ReLU(), normed, nn.Conv2d(8, 4, 1)).eval(), pixels(2, 3, 8, 8)
    changes = by_layer(prepare_qat(model, [x]), "qat")
    assert {name: change.reason for name, change in changes.items() if change.kept} == {
        "0": "Equalised: no integer form",
        "2": "its weight is computed (weight norm, spectral norm): remove that first",
    }
    assert not qat_operations(model).keys() & {"0", "2"}
    freeze(model, [x])
    matrix = model[0].matrix
    assert torch.equal(matrix, matrix.half().float())


def test_encoder_layer_is_called() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    model[1] = type("Tokens", (nn.Module,), {"forward": lambda self, x: x.flatten(2).transpose(1, 2)})()
    x = pixels(2, 3, 32, 32) / 64
    changes = by_layer(prepare_qat(model, [x], bits=2), "qat")
    assert [name for name, change in changes.items() if not change.kept] == ["0", "2.layers.0.linear1", "2.layers.0.linear2"]
    before = answer(model, x)
    with torch.no_grad():
        model.get_parameter("2.layers.0.linear2.log_scale").add_(1.0)
    assert not torch.allclose(answer(model, x), before)  # else the layer was not called


def test_dead_channels() -> None:
    model, x = Perceptron().eval(), pixels(2, 3, 8, 8)
    with torch.no_grad():
        model.second.weight[3:6] = 0
        model.third.weight.zero_()
    before = answer(model, x)
    prepare_qat(model, [x])
    assert torch.equal(answer(model, x), before)  # the bias of the third alone
    model(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    second = model.second
    assert isinstance(second, QATLinear) and not second.rounded()[3:6].any() and second.rounded()[:3].any()
    freeze(model, [x])
    assert not model.get_buffer("second.integers")[:, 3:6].any()
    assert torch.equal(answer(model, x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(dtype), pixels(2, 3, 16, 16)
    prepare_qat(model, [x])
    trained = model(x.to(dtype))
    trained.float().sum().backward()
    assert trained.dtype == dtype and all(parameter.grad is not None for parameter in model.parameters())
    assert freeze(model)
    with torch.no_grad():
        frozen = model(x.to(dtype))
    assert (frozen - trained).float().std() < 0.05 * trained.float().std()


@pytest.mark.parametrize("pass_", [quantize, low_rank])
def test_other_passes_refuse(pass_: Callable[[nn.Module, list[Tensor]], Any]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), pixels(2, 3, 16, 16)
    prepare_qat(model, [x])
    with pytest.raises(MuntinError, match=r"0 is in quantisation-aware training \(2 operations are\): call freeze\(model\)"):
        pass_(model, [x])


def test_export_refuses(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), pixels(2, 3, 16, 16)
    prepare_qat(model, [x])
    with pytest.raises(MuntinError, match="call freeze"):
        export(model, x, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_bits_by_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(32, 6)
    prepare_qat(model, [x], bits={"*": 5, "2": 3}, keep=("4",))
    assert bits_of(model) == {"0": 5, "2": 3}
    prepare_qat(model, [x], bits={"0": 5, "2": 3})
    assert bits_of(model) == {"0": 5, "2": 3, "4": 8}
    with pytest.raises(MuntinError, match="bits=8: '0' is in quantisation-aware training with 5 bits"):
        prepare_qat(model, [x], bits={"2": 3})
    with pytest.raises(MuntinError, match="bits names no layer: head"):
        prepare_qat(nn.Sequential(nn.Linear(6, 8)), [x], bits={"head": 3})
