"""Layers that read the image get the pixels' grid, or a coarser one, if theirs is near it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from muntin.compression.quantization.observer import ActivationGrid
from muntin.compression.quantization.pixel_grid import align_with_pixels
from muntin.compression.quantization.quantized_layers import QuantizedConv2d


class Net(nn.Module):
    """A normalisation, a convolution that reads the image, and one that does not."""

    def __init__(self, scale: float, *, mean: float = 128.0, std: float = 64.0, unsigned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.std = mean, std
        grid = ActivationGrid(scale=scale, unsigned=unsigned)
        self.stem = QuantizedConv2d(nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False), grid)
        self.head = QuantizedConv2d(nn.Conv2d(8, 4, 1).requires_grad_(False), grid)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem((images - self.mean) / self.std))


IMAGES = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(3)).float()


@pytest.mark.parametrize("share", [0.985, 0.993, 1.0, 1.005, 1.018])
def test_near_grid_is_aligned(share: float) -> None:
    net = Net(share / 64)
    assert align_with_pixels(net, IMAGES) == ["stem"]
    assert float(net.stem.input.scale) == 1 / 64
    assert float(net.head.input.scale) == pytest.approx(share / 64)
    x = (IMAGES - 128) / 64
    assert torch.equal(net.stem.input(x), x)  # nothing is rounded


@pytest.mark.parametrize("share", [0.997, 0.9995, 1.0, 1.0006, 1.0036])
def test_near_grid_between_levels_gets_coarser(share: float) -> None:
    net = Net(share / 64, mean=127.5)
    assert align_with_pixels(net, IMAGES) == ["stem"]
    assert float(net.stem.input.scale) == pytest.approx(127.5 / 127 / 64)


@pytest.mark.parametrize(
    "net",
    [
        Net(0.97 / 64),
        Net(1.03 / 64),
        Net(0.995 / 64, mean=127.5),
        Net(1.005 / 64, mean=127.5),
        Net(1.0, mean=0.0, std=1.0, unsigned=True),
        Net(0.005),
    ],
    ids=["finer", "coarser", "finer, between two levels", "coarser, between two levels", "no offset", "another"],
)
def test_other_grids(net: Net) -> None:
    before = float(net.stem.input.scale)
    assert align_with_pixels(net, IMAGES) == []
    assert float(net.stem.input.scale) == before


@pytest.mark.parametrize(("share", "mean"), [(0.9995, 127.5), (1.0036, 127.5), (1.005, 127.5), (0.993, 128.0)])
def test_runtime_result(share: float, mean: float, tmp_path: object) -> None:
    """OpenVINO omits the rounding for grids within 1 % of the pixels' grid; beside it (127.5), within 0.4 %."""
    net = Net(share / 64, mean=mean).eval()
    align_with_pixels(net, IMAGES)
    artifact = muntin.export(net, IMAGES, f"{tmp_path}/artifact")
    result = muntin.verify(artifact.path, layers=True)
    assert result.problems == ()
    stem = next(check for check in result.checks if check.name == "stem")
    assert stem.error <= 0.01
    images = IMAGES.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    with torch.no_grad():
        np.testing.assert_allclose(muntin.load(artifact.path, precision="f32")(images), net(IMAGES).numpy(), atol=0.05)
