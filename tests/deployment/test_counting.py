"""Multiply-adds and parameters against numbers worked out by hand. Axes: B images, C channels, H W map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin import create_model
from muntin.compression import quantize
from muntin.deployment import image_macs, parameter_count
from muntin.deployment.counting import stored_bytes
from muntin.layers import DenseAttention


@pytest.fixture
def mixed(build: type[nn.Module]) -> nn.Module:
    """Every kind of layer that has weights, one used twice, and a product of activations."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.depthwise(m.grouped(m.strided(x / 255)))
        t_BNC = m.linear(m.linear(x.flatten(2).transpose(1, 2)))
        return m.head(torch.matmul(t_BNC.transpose(1, 2), t_BNC).mean(1))

    return build(
        run,
        strided=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        grouped=nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False),
        depthwise=nn.Conv2d(12, 12, 5, padding=2, groups=12),
        linear=nn.Linear(12, 12),
        head=nn.Linear(12, 5, bias=False),
    ).eval()


MACS = {  # a map of 10 x 13 after the stride
    "strided": 10 * 13 * 8 * 3 * 9,
    "grouped": 10 * 13 * 12 * 4 * 9,
    "depthwise": 10 * 13 * 12 * 25,
    "linear": 2 * 10 * 13 * 12 * 12,
    "head": 12 * 5,
}
PRODUCT = 12 * 130 * 12
PARAMETERS = (8 * 27 + 8) + 12 * 36 + (12 * 25 + 12) + (144 + 12) + 60


def test_image_macs(mixed: nn.Module) -> None:
    assert image_macs(mixed, torch.zeros(3, 3, 20, 25)) == sum(MACS.values()) + PRODUCT


def test_parameter_count(mixed: nn.Module) -> None:
    assert parameter_count(mixed) == PARAMETERS


@pytest.mark.parametrize("keep", [(), ("linear", "depthwise")])
def test_counts_after_quantisation(mixed: nn.Module, keep: tuple[str, ...], pixels: Callable[..., Tensor]) -> None:
    x = pixels(2, 3, 20, 25)
    changes = quantize(mixed, [x], keep=keep, min_sqnr_db=0)
    assert sum(not change.kept for change in changes) == 5 - len(keep)
    assert image_macs(mixed, x) == sum(MACS.values()) + PRODUCT
    assert parameter_count(mixed) == PARAMETERS


def test_macs_of_a_quantised_hybrid(pixels: Callable[..., Tensor]) -> None:
    model, x = create_model("hybrid-xs", options={"depths": (1,), "dims": (128,)}), pixels(1, 3, 40, 56)
    before = image_macs(model, x)
    quantize(model, [x])
    assert image_macs(model, x) == before


def test_macs_of_dense_attention() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = DenseAttention(8, heads=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x.permute(0, 2, 3, 1))
            return out

    tokens = 5 * 7
    projections = tokens * (8 * 24 + 8 * 8)
    assert image_macs(Dense(), torch.zeros(1, 8, 5, 7)) == projections + 2 * tokens**2 * 8


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_macs_of_pytorch_attention() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers(x.flatten(2).transpose(1, 2))
            return out

    tokens = 5 * 7
    layer = tokens * 8 * (24 + 8 + 2 * 12) + 2 * tokens**2 * 8
    assert image_macs(Encoder(), torch.zeros(1, 8, 5, 7)) == 2 * layer
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_without_memory() -> None:
    dense = DenseAttention(8, heads=2)
    assert image_macs(dense, torch.zeros(1, 512, 512, 8)) == 2**18 * 8 * 32 + 2 * 2**36 * 8  # its logits alone would be 512 GiB
    quantize(dense, [torch.rand(1, 4, 4, 8)])
    assert image_macs(dense, torch.zeros(1, 512, 512, 8)) == 2**18 * 8 * 32 + 2 * 2**36 * 8


def test_macs_of_uint8_batches(mixed: nn.Module) -> None:
    images = torch.zeros(4, 3, 20, 25, dtype=torch.uint8)
    assert image_macs(mixed, images) == image_macs(mixed, images[:1].float())


@pytest.mark.parametrize(
    ("inputs", "value", "each"),
    [(13, 0.5, 2), (13, 1 / 3, 4), (13, 1e6, 4), (13, 1e-9, 4), (12, 0.5, 4)],  # too long, too large, too small for FP16; only 60
)
def test_stored_bytes_of_half_precision(inputs: int, value: float, each: int) -> None:
    layer = nn.Linear(inputs, 5)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    assert stored_bytes(nn.Sequential(layer, nn.ReLU())) == each * inputs * 5 + 4 * 5


def test_macs_of_data_dependent_models() -> None:
    class Keeping(nn.Module):
        grid: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("grid", torch.ones(x.shape[2:]), persistent=False)
            out: Tensor = self.conv(x) * self.grid
            return out

    class Looking(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) < 1 else -x)

    assert image_macs(Keeping(), torch.zeros(1, 3, 5, 7)) == image_macs(Looking(), torch.zeros(1, 3, 5, 7)) == 5 * 7 * 12
    model = Keeping()
    image_macs(model, torch.zeros(1, 3, 5, 7))
    assert torch.isfinite(model(torch.zeros(1, 3, 5, 7))).all() and not hasattr(model.grid, "fake_mode")
