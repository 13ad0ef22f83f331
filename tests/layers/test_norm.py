"""MapNorm and TokenNorm: the affine map after training, groups, padding, errors. Axes as in the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from muntin.errors import MuntinError
from muntin.layers import Grid, MapNorm, TokenNorm, merge, partition
from muntin.layers.norm import GROUP

NormT = TypeVar("NormT", MapNorm, TokenNorm)
WINDOWS = [None, 1, 2, 4]  # on a 6 x 5 map: one window an image, windows that divide it, that pad one side, that pad both


def random_state(norm: NormT) -> NormT:
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return norm.double()


def affine_of(norm: MapNorm | TokenNorm, x: Tensor) -> Tensor:
    """The affine map after training, from the definition, along the last axis."""
    return (x - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias


class TokenNormOfMaps(nn.Module):
    """A `TokenNorm` with the interface of a `MapNorm`."""

    def __init__(self, norm: TokenNorm, window: int | None) -> None:
        super().__init__()
        self.norm = norm
        self.window = window

    def forward(self, x_BCHW: Tensor) -> Tensor:
        t_STC, grid = partition(x_BCHW.permute(0, 2, 3, 1), self.window)
        return merge(self.norm(t_STC, grid), grid).permute(0, 3, 1, 2)


def norms() -> dict[str, nn.Module]:
    """Norms of each kind, with the same state."""
    norm = random_state(MapNorm(3))
    result: dict[str, nn.Module] = {"map": norm}
    for window in WINDOWS:
        token = TokenNorm(3).double()
        token.load_state_dict(norm.state_dict())
        result[f"tokens, window {window}"] = TokenNormOfMaps(token, window)
    return result


@pytest.fixture(params=["map", *(f"tokens, window {window}" for window in WINDOWS)])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Two equal norms."""
    norm = norms()[request.param]
    return norm, copy.deepcopy(norm)


@pytest.fixture
def norm(pair: tuple[nn.Module, nn.Module]) -> nn.Module:
    return pair[0]


def step(norm: nn.Module, x_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Run forward and backward; the gradients accumulate."""
    out = norm(x_BCHW)
    (out * target_BCHW).sum().backward()
    return out.detach()


def state(norm: nn.Module) -> list[Tensor]:
    return [*norm.buffers(), *(parameter.grad for parameter in norm.parameters() if parameter.grad is not None)]


def test_norm_after_training(norm: nn.Module) -> None:
    inner = norm if isinstance(norm, MapNorm) else norm.norm
    x_BCHW = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    expected = affine_of(inner, x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm.eval()(x_BCHW), expected, rtol=0, atol=1e-12)
    a_C, b_C = inner.affine()
    torch.testing.assert_close(a_C.reshape(3, 1, 1) * x_BCHW + b_C.reshape(3, 1, 1), expected, rtol=0, atol=1e-12)


def test_norm_statistics_in_evaluation(norm: nn.Module) -> None:
    before = [buffer.clone() for buffer in norm.buffers()]
    norm.eval()(torch.randn(9, 3, 6, 5, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


@pytest.mark.parametrize("batch", [1, 8, 11, 16])
def test_norm_in_training_by_formula(norm: nn.Module, batch: int) -> None:
    inner = norm if isinstance(norm, MapNorm) else norm.norm
    x_BCHW = 3 * torch.randn(batch, 3, 6, 5, dtype=torch.float64) + 2
    running_mean, running_var = inner.running_mean.clone(), inner.running_var.clone()
    expected = []
    for start in range(0, batch, GROUP):
        part = x_BCHW[start : start + GROUP]
        flat_NC = part.permute(0, 2, 3, 1).reshape(-1, 3)
        mean, variance = flat_NC.mean(0), flat_NC.var(0, unbiased=False)
        scaled = (part - mean.reshape(3, 1, 1)) / torch.sqrt(variance + inner.eps).reshape(3, 1, 1)
        expected.append(scaled * inner.weight.reshape(3, 1, 1) + inner.bias.reshape(3, 1, 1))
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * flat_NC.var(0)
    torch.testing.assert_close(norm.train()(x_BCHW), torch.cat(expected), rtol=0, atol=1e-11)
    torch.testing.assert_close(inner.running_mean, running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(inner.running_var, running_var, rtol=0, atol=1e-12)


def test_norm_of_16_and_of_8_images(pair: tuple[nn.Module, nn.Module]) -> None:
    norm, other = pair[0].train(), pair[1].train()
    x_BCHW, target_BCHW = torch.randn(2, 16, 3, 6, 5, dtype=torch.float64)
    whole_x, split_x = x_BCHW.clone().requires_grad_(), x_BCHW.clone().requires_grad_()
    whole = step(norm, whole_x, target_BCHW)
    parts = [step(other, x, t) for x, t in zip(split_x.split(8), target_BCHW.split(8), strict=True)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole_x.grad is not None and split_x.grad is not None
    assert torch.equal(whole_x.grad, split_x.grad)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), other.buffers(), strict=True))
    for a, b in zip(state(norm), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_norm_of_a_split_group(norm: nn.Module) -> None:
    x_BCHW = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    norm.train()
    assert not torch.allclose(norm(x_BCHW), torch.cat([norm(x_BCHW[:4]), norm(x_BCHW[4:])]), atol=1e-3)


@pytest.mark.parametrize("window", [2, 4])
def test_norm_with_any_padding(window: int, garbage: Callable[[Tensor, int | None], tuple[Tensor, Tensor, Grid]]) -> None:
    x_BHWC = torch.randn(11, 6, 5, 3, dtype=torch.float64)
    clean_STC, dirty_STC, grid = garbage(x_BHWC, window)
    target_BHWC = torch.randn_like(x_BHWC)
    results = []
    for t_STC in (clean_STC, dirty_STC):
        torch.manual_seed(1)
        norm = random_state(TokenNorm(3)).train()
        out = merge(norm(t_STC, grid), grid)
        (out * target_BHWC).sum().backward()
        results.append([out.detach(), *state(norm)])
    assert len(results[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_norm_of_a_window_of_mostly_padding() -> None:
    x_BHWC = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    t_STC, grid = partition(x_BHWC, 8)
    out = TokenNorm(3).double().train()(t_STC, grid)
    assert out.isfinite().all()
    merged = merge(out, grid)
    torch.testing.assert_close(merged.mean((0, 1, 2)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 9])
def test_norm_of_a_single_value(batch: int) -> None:
    with pytest.raises(MuntinError, match="multiple of 8"):
        MapNorm(3).train()(torch.randn(batch, 3, 1, 1))
