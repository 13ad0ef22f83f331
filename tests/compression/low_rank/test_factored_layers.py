"""Factored layers: structure, shapes, results. Axes: B images, C channels, H W map."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from muntin.compression.low_rank.costs import FactoredCosts
from muntin.compression.low_rank.factored_layers import (
    FactoredConv2d,
    FactoredLinear,
    factored_macs,
    factored_parameters,
    full_ranks,
    shell,
)

CONVS = {
    "1x1": (nn.Conv2d(6, 10, 1), (3,)),
    "1x1 strided, padded": (nn.Conv2d(6, 10, 1, 2, 1), (3,)),
    "3x3 strided": (nn.Conv2d(6, 10, 3, 2, 1, bias=False), (4, 5)),
    "3x3 dilated": (nn.Conv2d(6, 10, 3, 1, 2, 2), (4, 5)),
    "2x2": (nn.Conv2d(6, 10, 2, 2), (4, 5)),
    "1x3": (nn.Conv2d(6, 10, (1, 3), (1, 2), (0, 1)), (4, 5)),
    "7x7": (nn.Conv2d(3, 10, 7, 2, 3), (5,)),
    "5x3": (nn.Conv2d(6, 10, (5, 3), (2, 1), (2, 1), (1, 2)), (5,)),
    "1x7": (nn.Conv2d(6, 10, (1, 7), 1, (0, 3)), (5,)),
    "patches": (nn.Conv2d(3, 10, 8, 8), (5,)),
}


def zero(layer: nn.Module) -> nn.Module:
    """Set all parameters to zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


@pytest.mark.parametrize("name", CONVS)
def test_convolution_shell(name: str) -> None:
    layer, ranks = CONVS[name]
    factored = shell(layer, ranks)
    assert isinstance(factored, FactoredConv2d)
    assert factored.ranks == ranks
    assert sum(parameter.numel() for parameter in factored.parameters()) == factored_parameters(layer, ranks)
    x = torch.randn(2, layer.in_channels, 17, 22)
    assert zero(factored)(x).shape == layer(x).shape
    assert (factored.in_channels, factored.out_channels) == (layer.in_channels, layer.out_channels)
    assert (factored.expand.bias is None) == (layer.bias is None)
    assert all(type(part) is nn.Conv2d for part in factored.children())
    assert all(part.bias is None for part in factored.children() if part is not factored.expand)
    assert [name for name, _ in factored.named_children()] == (["reduce", "core", "expand"] if len(ranks) == 2 else ["reduce", "expand"])


def test_costs_of_a_factored_model() -> None:
    """Multiply-adds of one image, at all positions of the map."""
    layer = nn.Conv2d(6, 10, 3, 2, 1, bias=False)
    model = nn.Sequential(shell(layer, (4, 5)))
    costs = FactoredCosts.of(model, [torch.zeros(3, 6, 14, 22), torch.zeros(1, 6, 14, 22)], with_macs=True)
    assert (costs.layers, costs.dense_macs, costs.dense_parameters) == (1, 10 * 6 * 9 * 7 * 11, 10 * 6 * 9)
    assert costs.macs == factored_macs(layer, (4, 5), 7 * 11) and costs.parameters == factored_parameters(layer, (4, 5))


def test_strided_1x1_order() -> None:
    factored = shell(nn.Conv2d(6, 10, 1, 2), (3,))
    assert factored.reduce.stride == (2, 2) and factored.expand.stride == (1, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_shell(bias: bool) -> None:
    layer = nn.Linear(7, 12, bias=bias)
    factored = shell(layer, (4,))
    assert isinstance(factored, FactoredLinear)
    assert (factored.in_features, factored.out_features, factored.ranks) == (7, 12, (4,))
    assert (factored.reduce.bias is None, factored.expand.bias is None) == (True, not bias)
    assert sum(parameter.numel() for parameter in factored.parameters()) == factored_parameters(layer, (4,))
    zero(factored)
    assert factored(input=torch.randn(2, 3, 7)).shape == (2, 3, 12)


def test_shell_type_device_and_randomness() -> None:
    before = torch.get_rng_state()
    for layer, ranks in [(nn.Linear(4, 4), (2,)), (nn.Conv2d(4, 4, 3), (2, 2))]:
        torch.set_rng_state(before)
        factored = shell(layer.to(torch.bfloat16), ranks)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), before)
        assert {(p.dtype, p.device) for p in factored.parameters()} == {(torch.bfloat16, torch.device("cpu"))}


def test_full_ranks() -> None:
    assert full_ranks(nn.Linear(7, 12)) == (7,)
    assert full_ranks(nn.Conv2d(12, 7, 1)) == (7,)
    assert full_ranks(nn.Conv2d(6, 10, 3)) == (6, 10)
    assert full_ranks(nn.Conv2d(2, 40, 3)) == (2, 18)  # 2·9 inputs cannot give more
    assert full_ranks(nn.Conv2d(3, 10, 7)) == (21,)
    assert full_ranks(nn.Conv2d(3, 10, (1, 7))) == (3,)


@pytest.mark.parametrize("ranks", [(), (0,), (-1,), (8,), (2, 2)])
def test_ranks_out_of_range(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Linear \(12, 7\) takes 1-7"):
        shell(nn.Linear(7, 12), ranks)


def test_parts_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="reduce gives 3 features and expand takes 4"):
        FactoredLinear(nn.Linear(7, 3, bias=False), nn.Linear(4, 12))
    with pytest.raises(ValueError, match="gives 3 channels and the next takes 4"):
        FactoredConv2d(nn.Conv2d(7, 2, 1), nn.Conv2d(4, 12, 1), nn.Conv2d(2, 3, 3))


def test_chain_order() -> None:
    factored = FactoredConv2d(nn.Conv2d(7, 2, 1, bias=False), nn.Conv2d(3, 12, 1), nn.Conv2d(2, 3, 3, padding=1, bias=False))
    x = torch.randn(1, 7, 5, 5)
    assert torch.equal(factored(x), factored.expand(factored.core(factored.reduce(x))))
    assert factored.ranks == (2, 3)


@pytest.mark.parametrize(
    ("layer", "ranks"),
    [
        (nn.Linear(12, 20), (5,)),
        (nn.Conv2d(12, 20, 1, stride=2), (5,)),
        (nn.Conv2d(12, 20, 3, padding=1), (5, 7)),
        (nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False), (5, 7)),
        (nn.Conv2d(12, 20, 4, stride=4), (5, 7)),
        (nn.Conv2d(3, 20, 7, stride=2, padding=3), (5,)),
        (nn.Conv2d(12, 20, (5, 1), padding=(2, 0)), (5,)),
    ],
)
def test_multiply_adds(layer: nn.Linear | nn.Conv2d, ranks: tuple[int, ...]) -> None:
    x = torch.randn(1, 16, 24, 12) if isinstance(layer, nn.Linear) else torch.randn(1, layer.in_channels, 16, 24)
    positions = layer(x).numel() // layer.weight.shape[0]
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.weight.numel() * positions == counter.get_total_flops() / 2
    with FlopCounterMode(display=False) as counter:
        shell(layer, ranks)(x)
    assert factored_macs(layer, ranks, positions) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", CONVS)
def test_convolution_weight(name: str) -> None:
    layer, ranks = CONVS[name]
    factored = shell(layer, ranks)
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter.normal_()
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False)
    plain.weight, plain.bias = nn.Parameter(factored.weight.detach()), factored.expand.bias
    x = torch.randn(2, layer.in_channels, 17, 22)
    assert factored.weight.shape == layer.weight.shape
    torch.testing.assert_close(factored(x), plain(x), rtol=1e-4, atol=1e-4)


def test_linear_weight() -> None:
    factored = shell(nn.Linear(7, 12), (4,))
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter.normal_()
    x = torch.randn(3, 7)
    assert factored.weight.shape == (12, 7)
    torch.testing.assert_close(factored(x), nn.functional.linear(x, factored.weight, factored.expand.bias))
