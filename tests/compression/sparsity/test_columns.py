from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.sparsity.columns import InputMoments, sparse_columns, sparsify_weight
from muntin.compression.sparsity.pattern import parse_pattern, taps_first, taps_last


def correlated(rows: int, inputs: int) -> Tensor:
    """Inputs that share a few causes, with a mean."""
    return torch.randn(rows, 8) @ torch.randn(8, inputs) + 0.3 * torch.randn(rows, inputs) + 1


def moments_of(layer: nn.Linear | nn.Conv2d, x: Tensor) -> InputMoments:
    moments = InputMoments.empty(layer)
    moments.add(layer, x)
    return moments


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "convolution"])
def test_beats_magnitude_on_correlated_inputs(text: str, kind: str) -> None:
    pattern = parse_pattern(text)
    if kind == "convolution":
        layer: nn.Linear | nn.Conv2d = nn.Conv2d(32, 16, 3, padding=1, stride=2)
        x = correlated(16 * 64, 32).reshape(16, 8, 8, 32).permute(0, 3, 1, 2)
    else:
        layer = nn.Linear(64, 32, bias=kind == "linear")
        x = correlated(1024, 64)
    dense, weight = layer.weight.detach().clone(), layer.weight
    exact = layer(x).detach()
    plain = dense.masked_fill(~taps_last(pattern.mask(taps_first(dense).square()), dense), 0)
    error, share = sparsify_weight(layer, pattern, moments_of(layer, x))
    held = pattern.held(weight)
    assert held is not None and float((weight != 0).float().mean()) == pytest.approx(0.25 if text == "1:4" else 0.5)
    assert 0 < error < 1 and share < 0.7
    with torch.no_grad():
        sparse = layer(x)
        by_magnitude = F.linear(x, plain, layer.bias) if isinstance(layer, nn.Linear) else F.conv2d(x, plain, layer.bias, 2, 1)
    measured, baseline = ((form - exact).square().mean() for form in (sparse, by_magnitude))
    assert measured < 0.7 * baseline


def test_reported_error_is_the_outputs() -> None:
    layer, x = nn.Linear(32, 16, bias=False), correlated(512, 32)
    exact = layer(x).detach()
    error, _ = sparsify_weight(layer, parse_pattern("2:4"), moments_of(layer, x))
    measured = float((layer(x).detach() - exact).square().sum() / exact.square().sum())
    assert error == pytest.approx(measured, rel=1e-3)


def test_uncorrelated_inputs_keep_their_weights() -> None:
    """Without correlation nothing can be made up for: the places are those of the largest weights, which do not change."""
    weight = torch.randn(6, 16, dtype=torch.float64)
    pattern = parse_pattern("2:4")
    sparse = sparse_columns(weight, 2 * torch.eye(16, dtype=torch.float64), pattern)
    torch.testing.assert_close(sparse, weight * pattern.mask(weight.square()[:, None])[:, 0])


def test_updates_match_least_squares_in_order() -> None:
    """With the places given by the first pass, the last group's weights minimise the error of what the earlier ones left."""
    x = correlated(400, 8).double()
    moment, weight = x.T @ x / len(x), torch.randn(3, 8, dtype=torch.float64)
    sparse = sparse_columns(weight, moment, parse_pattern("4:8"))
    zero = parse_pattern("4:8").mask((sparse != 0).double()[:, None])[:, 0].logical_not()
    for row, zeros, before in zip(sparse, zero, weight, strict=True):
        last = int(zeros.nonzero().max())
        after = torch.arange(8) > last  # the columns that follow the last zero are free
        slope = (row - before) @ moment
        assert float(slope[after].abs().sum()) < 1e-9 * float(moment.abs().sum()) if after.any() else True


@pytest.mark.parametrize("inputs", ["zeros", "constant", "few"])
def test_degenerate_inputs(inputs: str) -> None:
    layer = nn.Linear(16, 8)
    x = {"zeros": torch.zeros(64, 16), "constant": torch.ones(64, 16), "few": torch.randn(2, 16)}[inputs]
    error, share = sparsify_weight(layer, parse_pattern("2:4"), moments_of(layer, x))
    assert layer.weight.isfinite().all() and error >= 0 and share <= 1
    assert parse_pattern("2:4").held(layer.weight) is not None
