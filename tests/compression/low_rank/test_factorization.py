"""The low-rank pass: single layers, budgets, kept layers. Axes: N rows, B images, C channels, H W map."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_helpers import answer, count, pixels, settled
from muntin import create_model
from muntin.compression import Change, fold, quantize
from muntin.compression.activation_moments import answer_sensitivity, input_moments
from muntin.compression.low_rank.factored_layers import full_ranks
from muntin.compression.low_rank.factorization import (
    DAMPING,
    apply_structure,
    factor,
    factorize,
    low_rank,
    spectra,
    square_root,
    structure_of,
)
from muntin.compression.low_rank.rank_choices import rank_at
from muntin.compression.quantization.fake_quantization import sqnr_db
from muntin.errors import MuntinError
from muntin.training.config import LowRankConfig

LAYERS: dict[str, Callable[[], nn.Linear | nn.Conv2d]] = {
    "linear": lambda: nn.Linear(6, 10),
    "linear down": lambda: nn.Linear(10, 6, bias=False),
    "1x1": lambda: nn.Conv2d(6, 10, 1),
    "1x1 strided, padded": lambda: nn.Conv2d(6, 10, 1, 2, 1),
    "3x3 strided": lambda: nn.Conv2d(6, 10, 3, 2, 1, bias=False),
    "3x3 dilated": lambda: nn.Conv2d(6, 10, 3, 1, 2, 2),
    "2x2": lambda: nn.Conv2d(6, 10, 2, 2),
    "1x3": lambda: nn.Conv2d(6, 10, (1, 3), (1, 2), (0, 1)),
    "few inputs": lambda: nn.Conv2d(2, 40, 3, padding=1),
    "7x7": lambda: nn.Conv2d(3, 10, 7, 2, 3),
    "5x3": lambda: nn.Conv2d(6, 10, (5, 3), (2, 1), (2, 1), (1, 2)),
    "1x7": lambda: nn.Conv2d(6, 10, (1, 7), 1, (0, 3)),
    "patches": lambda: nn.Conv2d(3, 10, 8, 8),
}


def correlated(rows: int, channels: int) -> Tensor:
    """Rows with correlated channels."""
    decay = torch.logspace(0, -3, channels, dtype=torch.float64)
    return torch.randn(rows, channels, dtype=torch.float64) * decay @ torch.randn(channels, channels, dtype=torch.float64)


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def by_layer(changes: list[Change]) -> dict[str, Change]:
    assert len({change.layer for change in changes}) == len(changes)  # exactly one each
    assert {change.pass_ for change in changes} <= {"low_rank"}
    assert all(bool(change.reason) == change.kept for change in changes)
    return {change.layer: change for change in changes}


def perceptron(width: int = 64, **more: nn.Module) -> Any:
    """Three Linears over the channels of raw pixels."""

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, width)
            self.second = nn.Linear(width, width)
            self.third = nn.Linear(width, 4)
            for name, part in more.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.second(torch.relu(self.first((x / 64 - 2).permute(0, 2, 3, 1)))))
            out: Tensor = self.third(hidden).permute(0, 3, 1, 2)
            return out

    return Perceptron()


# One layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("whitened", [False, True])
def test_full_rank_output(name: str, whitened: bool) -> None:
    layer = LAYERS[name]().double()
    x = torch.randn(2, 17, 22, layer.weight.shape[1]).double() @ torch.randn(layer.weight.shape[1], layer.weight.shape[1]).double()
    x = x if isinstance(layer, nn.Linear) else x.permute(0, 3, 1, 2)
    root = square_root(input_moments(nn.Sequential(layer), [x], {"0": layer})["0"].matrix) if whitened else None
    factored = factorize(layer, full_ranks(layer), root)
    assert torch.allclose(factored(x), layer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_losses_and_spectra(name: str) -> None:
    layer = LAYERS[name]()
    for values, full in zip(spectra(layer), full_ranks(layer), strict=True):
        assert len(values) == full and (values[:-1] >= values[1:]).all() and (values >= 0).all()
        assert values.sum() == pytest.approx(float(layer.weight.detach().double().square().sum()))
    x = torch.randn(2, 17, 22, layer.weight.shape[1])
    x = x if isinstance(layer, nn.Linear) else x.permute(0, 3, 1, 2)
    full = full_ranks(layer)
    losses = []
    for lower in range(min(full)):
        factored = factorize(layer, tuple(rank - lower for rank in full))
        assert factored.ranks == tuple(rank - lower for rank in full)
        losses.append(float((factored(x) - layer(x)).detach().square().mean()))
    assert losses[0] < 1e-9 and losses[-1] > losses[0]
    assert sum(after >= before - 1e-9 for before, after in itertools.pairwise(losses)) >= 0.7 * (len(losses) - 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 24), st.integers(2, 24), st.integers(0, 2**31))
def test_loss_against_measured_error(inputs: int, outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x_NI = nn.Linear(inputs, outputs).double(), torch.randn(400, inputs).double() @ torch.randn(inputs, inputs).double()
    moment_II = input_moments(nn.Sequential(layer), [x_NI], {"0": layer})["0"].matrix
    root = square_root(moment_II)
    unseen = DAMPING * float(moment_II.diagonal().mean())  # the power that each channel is taken to have beside what was seen
    (values,) = spectra(layer, root)
    with torch.no_grad():
        power = float(layer.weight.matmul(x_NI.T).square().sum(0).mean())
        for rank in range(1, len(values) + 1):
            factored = factorize(layer, (rank,), root)
            error = (factored(x_NI) - layer(x_NI)).square().sum(1).mean()
            error += unseen * (factored.expand.weight @ factored.reduce.weight - layer.weight).square().sum()
            assert float(error) == pytest.approx(values[rank:].sum(), rel=1e-6, abs=1e-9 * power)


@pytest.mark.parametrize(("kernel", "ranks"), [(0, (4,)), (0, (8,)), (0, (16,)), (0, (32,)), (1, (8,)), (3, (8, 16)), (7, (16,))], ids=str)
def test_activation_criterion_on_correlated_inputs(kernel: int, ranks: tuple[int, ...]) -> None:
    """Kernel 0: a Linear."""
    layer = nn.Conv2d(24, 24, kernel, padding=kernel // 2).double() if kernel else nn.Linear(48, 64).double()
    x = correlated(2 * 12 * 12, 24).reshape(2, 12, 12, 24).permute(0, 3, 1, 2) if kernel else correlated(2000, 48)
    root = square_root(input_moments(nn.Sequential(layer), [x], {"0": layer})["0"].matrix)
    with torch.no_grad():
        errors = [float((factorize(layer, ranks, r)(x) - layer(x)).square().sum()) for r in (root, None)]
    assert errors[0] < 0.5 * errors[1]


def pooled(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """Correlated, rectified features with a mean that is not zero, one row an image."""
    mixing = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    hidden = torch.randn(rows, channels, generator=generator, dtype=torch.float64) * torch.arange(1, channels + 1).pow(-0.5)
    return torch.relu(8 * hidden @ mixing + 0.3)


def test_shrunk_moment_of_few_rows() -> None:
    """64 images for 384 channels: their moment has rank 64, that of other images a full one."""
    generator = torch.Generator().manual_seed(0)
    layer, new_NI, few_NI = nn.Linear(384, 128).double(), pooled(1000, 384, generator), pooled(64, 384, generator)
    moment = input_moments(nn.Sequential(layer), [few_NI], {"0": layer})["0"]
    assert moment.rows == 64
    with torch.no_grad():
        expected = layer(new_NI)
        roots = {"as seen": square_root(moment.matrix), "shrunk": square_root(moment.shrunk())}
        noise = {name: float((factorize(layer, (64,), root)(new_NI) - expected).square().sum(1).mean()) for name, root in roots.items()}
    notes = {name: float(spectra(layer, root)[0][64:].sum()) for name, root in roots.items()}
    assert noise["shrunk"] < noise["as seen"]
    assert notes["as seen"] < 0.1 * noise["as seen"]
    assert 0.5 * noise["shrunk"] < notes["shrunk"] < 1.5 * noise["shrunk"]


def test_note_on_few_rows() -> None:
    body = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    changes = by_layer(low_rank(model, [pixels(16, 3, 16, 16)], parameters=0.15, multiple=4, keep=("8",)))
    assert {name: change.note for name, change in changes.items() if not change.kept} == {
        "0": "", "2": "", "6": "16 rows of calibration for 64 channels",
    }  # fmt: skip


def test_ranges_of_both_parts() -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(100)
    factored = factorize(layer, (32,))
    norms = [factored.reduce.weight.norm(dim=1), factored.expand.weight.norm(dim=0)]
    assert torch.allclose(norms[0], norms[1], rtol=1e-4)


def test_type_device_and_frozen_weights() -> None:
    layer = nn.Linear(32, 32).to(torch.bfloat16).requires_grad_(False)
    factored = factorize(layer, (16,))
    assert {parameter.dtype for parameter in factored.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in factored.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in factorize(nn.Linear(32, 32), (16,)).parameters())


# The pass


@pytest.mark.parametrize("criterion", ["activation", "energy", "cumulative"])
def test_hybrid_budget_and_odd_sizes(criterion: str) -> None:
    model, x = create_model("hybrid-xs", classes=3), pixels(2, 3, 128, 128)
    settled(model, x)
    before, names, scores = count(model), layers(model), answer(model, x)
    changes = by_layer(low_rank(model, [x], criterion=criterion, parameters=0.4))  # type: ignore[arg-type]
    assert list(changes) == names
    assert 0.37 * before < count(model) <= 0.4 * before
    assert list(structure_of(model)) == [name for name, change in changes.items() if not change.kept]
    assert changes["stages.0.position.conv"].reason == "depthwise convolution: no factored form here"
    for name, ranks in structure_of(model).items():
        assert re.fullmatch(rf"ranks? {', '.join(map(str, ranks))} of \d+(, \d+)?", changes[name].done)
        assert all(rank % 16 == 0 or rank == 3 for rank in ranks)
    assert {len(ranks) for ranks in structure_of(model).values()} == {1, 2}
    assert answer(model, pixels(1, 3, 37, 51)).shape == (1, 3, 37, 51)
    assert not model.training
    if criterion == "activation":
        assert float((answer(model, x) - scores).square().mean() / scores.var()) < 0.01


def test_rising_budgets() -> None:
    model, x = settled(create_model("hybrid-xs", classes=3), pixels(2, 3, 128, 128)), pixels(2, 3, 128, 128)
    scores, noise, sizes = answer(model, x), [], []
    for share in (0.3, 0.45, 0.7, 1.0):
        smaller = copy.deepcopy(model)
        changes = by_layer(low_rank(smaller, [x], parameters=share))
        noise.append(float((answer(smaller, x) - scores).square().mean() / scores.var()))
        sizes.append(count(smaller) / count(model))
    assert all(size <= share for size, share in zip(sizes, (0.3, 0.45, 0.7, 1.0), strict=True))
    assert sizes == sorted(sizes) and noise == sorted(noise, reverse=True)
    assert all(change.kept for change in changes.values()) and noise[-1] == 0
    reasons = {change.reason for change in changes.values()}
    assert "dense within the budget: factoring other layers harms the answer less" in reasons


def test_estimated_against_measured_noise() -> None:
    """For one factored layer: dropped σ², times the sensitivity, times the rows an image. Exact if all directions count alike."""
    model, x = perceptron(), pixels(4, 3, 16, 16)
    nn.init.constant_(model.second.bias, 10)  # the ReLU behind it passes everything on
    model.third = nn.utils.parametrizations.orthogonal(nn.Linear(64, 64))
    moment = input_moments(model, [x], {"second": model.second})["second"]
    sensitivity = answer_sensitivity(model, [x], {"second": model.second})["second"]
    root, scores = square_root(moment.matrix), answer(model, x)
    (values,) = spectra(model.second, root)
    for rank in (1, 2):
        smaller = copy.deepcopy(model)
        smaller.second = factorize(model.second, (rank,), root)
        measured = float((answer(smaller, x) - scores).square().mean() / scores.var())
        assert values[rank:].sum() * sensitivity * moment.positions == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("folded_before", [False, True])
def test_quantization_afterwards(folded_before: bool) -> None:
    model, x = create_model("hybrid-xs", classes=3), pixels(2, 3, 128, 128)
    settled(model, x)
    if folded_before:
        fold(model)
    low_rank(model, [x], parameters=0.4)
    names, scores, parts = layers(model), answer(model, x), [f"{name}.reduce" for name in structure_of(model)]
    quantized = [change for change in quantize(model, [x]) if change.pass_ == "quantize"]
    assert sorted(change.layer for change in quantized) == sorted(names)
    done = {change.layer for change in quantized if not change.kept}
    assert len(done.intersection(parts)) > 0.5 * len(parts)  # pure noise as images: INT8 loses some of its nearly constant features
    assert float((answer(model, x) - scores).square().mean() / scores.var()) < 0.1
    scores = answer(model, x)
    assert all(change.kept for change in low_rank(model, [x], parameters=0.4))
    assert torch.equal(answer(model, x), scores)


@pytest.mark.parametrize(("name", "side"), [("timm:test_convnext", 64), ("timm:test_vit", 160)])
def test_foreign_networks(name: str, side: int) -> None:
    model, x = create_model(name, task="classify", classes=4), pixels(2, 3, side, side)
    settled(model, x)
    before, names, scores = count(model), layers(model), answer(model, x)
    changes = by_layer(low_rank(model, [x], parameters=0.5))
    assert list(changes) == names
    assert count(model) <= 0.5 * before
    assert answer(model, x).shape == scores.shape and torch.isfinite(answer(model, x)).all()


def test_encoder_layer_fused_path() -> None:
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(32, 5))
    x = torch.randn(4, 6, 8)
    for criterion in ("activation", "energy"):
        smaller = copy.deepcopy(model)
        changes = by_layer(low_rank(smaller, [x], criterion=criterion, parameters=0.9))  # type: ignore[arg-type]
        assert "NonDynamicallyQuantizableLinear" in changes["1.layers.0.self_attn.out_proj"].reason
        assert any(not changes[f"1.layers.{i}.linear{k}"].kept for i in (0, 1) for k in (1, 2))
        assert answer(smaller, x).shape == (4, 6, 5)  # PyTorch's fused path would look for linear1.weight


def test_layer_read_but_not_called() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called = nn.Linear(32, 32)
            self.read = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ self.read.weight

    for criterion in ("activation", "energy", "cumulative"):
        model = Reads()
        changes = by_layer(low_rank(model, [torch.randn(40, 32)], criterion=criterion, parameters=0.9, multiple=4))  # type: ignore[arg-type]
        assert changes["read"].reason == "no calibration image reached it"
        assert not changes["called"].kept


class Masked(nn.Linear):
    """A subclass may compute something else."""


def test_reasons_to_keep() -> None:
    shared = nn.Linear(32, 32)
    tied = nn.Linear(32, 32)
    other = nn.Linear(32, 32)
    other.weight = tied.weight
    convs = nn.Sequential(
        nn.Conv2d(3, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Flatten(2),
    )
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    linears = nn.Sequential(Masked(32, 32), tied, other, shared, shared, normed, nn.Linear(32, 32))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs, self.linears = convs, linears

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linears(self.convs(x).transpose(1, 2))
            return out

    model = Both()
    changes = by_layer(low_rank(model, [pixels(2, 3, 8, 8)], parameters=0.98, multiple=4, keep=("linears.6",)))
    assert {name: change.reason for name, change in changes.items() if change.kept and "would have" not in change.reason} == {
        "convs.1": "depthwise convolution: no factored form here",
        "convs.2": "grouped convolution: no factored form here",
        "linears.0": "Masked may compute something else than its kind: no factored form",
        "linears.1": "its parameters are shared by linears.1 and linears.2: factoring one of them saves nothing",
        "linears.2": "its parameters are shared by linears.1 and linears.2: factoring one of them saves nothing",
        "linears.5": "ParametrizedLinear may compute something else than its kind: no factored form",
        "linears.6": "named in keep",
    }
    assert not changes["linears.3"].kept and model.linears[3] is model.linears[4]  # one layer in two places stays one


def test_second_application() -> None:
    model, x = perceptron(), pixels(2, 3, 8, 8)
    assert not by_layer(low_rank(model, [x], parameters=0.8))["second"].kept
    scores, structure = answer(model, x), structure_of(model)
    changes = by_layer(low_rank(model, [x], parameters=1.0))
    assert {changes[f"second.{part}"].reason for part in ("reduce", "expand")} == {"already factored"}
    assert structure_of(model) == structure and torch.equal(answer(model, x), scores)


# Thresholds


def test_given_threshold() -> None:
    x = pixels(2, 3, 8, 8)
    model = perceptron()
    with torch.no_grad():
        model.second.weight.copy_(torch.diag(torch.tensor([2.0] * 32 + [1.0] * 32)))
    # σ: 32 of 2 and 32 of 1. Energy 160, of which 20 components hold half; sum 96, of which 24 hold half
    for criterion, rank in [("energy", 20), ("cumulative", 24)]:
        smaller = copy.deepcopy(model)
        changes = by_layer(low_rank(smaller, [x], criterion=criterion, threshold=0.5, multiple=1))  # type: ignore[arg-type]
        assert changes["second"].done == f"rank {rank} of 64"
    smaller = copy.deepcopy(model)
    changes = by_layer(low_rank(smaller, [x], criterion="cumulative", threshold=0.7, multiple=16))
    assert changes["second"].reason == "rank 48 of 64 would have 6,208 parameters, dense has 4,160"
    assert changes["first"].reason == "rank 3 of 3 would have 265 parameters, dense has 256"
    assert torch.equal(answer(smaller, x), answer(model, x))


def test_usual_threshold_on_gaussian_weight() -> None:
    """Σσ >= 0.7 of a square Gaussian matrix takes about 0.44 of its rank: almost no saving."""
    layer = nn.Linear(256, 256, bias=False)
    nn.init.normal_(layer.weight)
    (values,) = spectra(layer)
    assert rank_at(values**0.5, 0.7, 1) == pytest.approx(0.44 * 256, abs=4)


def test_configuration_out_of_range() -> None:
    with pytest.raises(ValidationError, match="threshold is for the criteria energy and cumulative"):
        LowRankConfig(threshold=0.9)
    for wrong in ({"parameters": 0.0}, {"parameters": 1.1}, {"multiple": 0}, {"rank": 3}, {"criterion": "energy", "threshold": 0.0}):
        with pytest.raises(ValidationError):
            LowRankConfig(**wrong)  # type: ignore[arg-type]


# Inputs that are not as they should be


def test_budget_out_of_reach() -> None:
    x = pixels(1, 3, 8, 8)
    for criterion in ("activation", "energy", "cumulative"):
        model = perceptron()
        with pytest.raises(MuntinError, match=r"46 parameters are out of reach: .* a share of 0\.5621"):
            low_rank(model, [x], criterion=criterion, parameters=0.01)  # type: ignore[arg-type]
        assert structure_of(model) == {}
        low_rank(model, [x], criterion=criterion, parameters=0.5621)  # type: ignore[arg-type]


def test_input_always_zero() -> None:
    model = perceptron()
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.fill_(-1)
    changes = by_layer(low_rank(model, [pixels(2, 3, 8, 8)], parameters=1.0))
    assert changes["second"].reason == "its input is zero on every calibration image"


@pytest.mark.parametrize("x", [torch.full((1, 3, 1, 1), 200.0), torch.full((2, 3, 8, 8), 128.0), pixels(1, 3, 4, 4)])
def test_one_sample_constants_and_dead_channels(x: Tensor) -> None:
    model = perceptron()
    with torch.no_grad():  # some channels of the hidden layer are always zero
        model.first.weight[:20] = 0
        model.first.bias[:20] = -1
    scores = answer(model, x)
    changes = by_layer(low_rank(model, [x], parameters=0.6))
    assert changes["second"].done == "rank 16 of 64"
    assert sqnr_db(scores, answer(model, x)) > 20


class Reused(nn.Module):
    """A backbone, and a function that calls it."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, 64)
        self.last = nn.Linear(64, 4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        features = self.call(self.backbone, (x / 64 - 2).permute(0, 2, 3, 1))
        answer: Tensor = self.last(torch.relu(self.head(features))).permute(0, 3, 1, 2)
        return answer


def test_answer_without_gradient() -> None:
    def frozen(backbone: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = backbone(x)
        return features

    model = Reused(frozen).eval()
    changes = by_layer(low_rank(model, [pixels(4, 3, 16, 16)], parameters=0.8, multiple=4))
    assert changes["backbone.2"].kept and changes["backbone.2"].reason.startswith("the answer does not depend on it, or not smoothly")
    assert not changes["head"].kept


def test_activation_checkpointing() -> None:
    def checkpointed(backbone: nn.Module, x: Tensor) -> Tensor:
        features: Tensor = checkpoint(backbone, x, use_reentrant=False)
        return features

    torch.manual_seed(0)
    plain = Reused(lambda backbone, x: backbone(x)).eval()
    saving = Reused(checkpointed).eval()
    saving.load_state_dict(plain.state_dict())
    x = pixels(4, 3, 16, 16)
    one, other = (by_layer(low_rank(model, [x], parameters=0.6, multiple=4)) for model in (plain, saving))
    assert one == other and not one["backbone.2"].kept


def test_zero_weight() -> None:
    model, x = perceptron(), pixels(2, 3, 8, 8)
    with torch.no_grad():
        model.second.weight.zero_()
    scores = answer(model, x)
    for criterion in ("energy", "cumulative"):
        smaller = copy.deepcopy(model)
        changes = by_layer(low_rank(smaller, [x], criterion=criterion, parameters=0.6))  # type: ignore[arg-type]
        assert changes["second"].done == "rank 16 of 64"
        assert torch.equal(answer(smaller, x), scores)


# Structure


def test_structure_round_trip() -> None:
    model, x = settled(create_model("hybrid-xs", classes=3), pixels(2, 3, 128, 128)), pixels(2, 3, 128, 128)
    low_rank(model, [x], parameters=0.4)
    structure = structure_of(model)
    assert structure and all(isinstance(rank, int) for ranks in structure.values() for rank in ranks)
    other = create_model("hybrid-xs", classes=3)
    apply_structure(other, structure)
    assert structure_of(other) == structure
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other, x), answer(model, x))
    apply_structure(other, structure)  # a second time keeps the weights
    assert torch.equal(answer(other, x), answer(model, x))


def test_structure_of_another_model() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    for structure, message in [
        ({"0": [8], "7": [8]}, "layer '7' is not in the model"),
        ({"0": [8], "1": [8]}, "layer '1' is a ReLU, not a Linear or Conv2d"),
        ({"0": [33]}, r"layer '0': ranks 33: Linear \(32, 32\) takes 1-32"),
        ({"0": [4, 4]}, r"layer '0': ranks 4, 4: Linear \(32, 32\) takes 1-32"),
        ({"": [8]}, "layer '' is a Sequential"),
    ]:
        with pytest.raises(MuntinError, match=message):
            apply_structure(model, structure)
        assert structure_of(model) == {}
    apply_structure(model, {"0": [8]})
    with pytest.raises(MuntinError, match="layer '0' is a FactoredLinear"):
        apply_structure(model, {"0": [9]})


def test_given_ranks() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(64, 12)).eval()
    x = torch.randn(8, 8, 6, 6)
    before = answer(model, x)
    changes = by_layer(factor(model, [x], {"0": (8, 16), "4": (12,)}))
    assert structure_of(model) == {"0": (8, 16), "4": (12,)} and changes["0"].done == "ranks 8, 16 of 8, 16"
    torch.testing.assert_close(answer(model, x), before, atol=1e-4, rtol=1e-4)
    assert by_layer(factor(model, [x], {})) == {}


def test_given_ranks_of_a_layer_without_factored_form() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16)).eval(), torch.randn(2, 16, 5, 5)
    (change,) = factor(model, [x], {"0": (4, 4)})
    assert change.kept and "depthwise" in change.reason


@pytest.mark.parametrize(
    ("ranks", "words"),
    [({"1": (4,)}, "ranks names no layer: 1"), ({"0": (9,)}, "ranks of '0': 9; the layer takes 1-8"), ({"0": ()}, "none")],
)
def test_ranks_that_do_not_fit(ranks: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(MuntinError, match=words):
        factor(model, [torch.randn(4, 8)], ranks)
    assert type(model[0]) is nn.Linear
