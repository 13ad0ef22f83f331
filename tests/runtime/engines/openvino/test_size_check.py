"""Sizes that become floats: found, and computed in float32 where sizes are free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact import open_artifact
from muntin.runtime.engines.openvino.size_check import computes_with_sizes
from muntin.runtime.host.quiet_imports import openvino


def waves(x_BCHW: Tensor) -> Tensor:
    places = torch.arange(x_BCHW.shape[3], device=x_BCHW.device)
    return x_BCHW + torch.sin(places / 10.0)


def sampled(x_BCHW: Tensor) -> Tensor:
    B, _, H, W = x_BCHW.shape
    y_H, x_W = ((torch.arange(side) + 0.5) / side * 1.8 - 0.9 for side in (H, W))
    grid_BHW2 = torch.stack([x_W[None, None].expand(B, H, W), y_H[None, :, None].expand(B, H, W)], -1)
    return F.grid_sample(x_BCHW, grid_BHW2, align_corners=False, padding_mode="border")


def halved(mode: str) -> Callable[[Tensor], Tensor]:
    return lambda x_BCHW: F.interpolate(F.avg_pool2d(x_BCHW, 2), size=x_BCHW.shape[2:], mode=mode)


class Placed(nn.Module):
    """A small segmenter with one step that needs to know where its values lie."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.step = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 4, 1), step

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        out: Tensor = self.head(self.step(torch.relu(self.stem(pixels_BCHW / 60 - 2))))
        return out


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "waves": (waves, True),
    "sampled": (sampled, True),
    "nearest-exact": (halved("nearest-exact"), True),
    "nearest": (halved("nearest"), False),
    "bilinear": (halved("bilinear"), False),
    "mean": (lambda x_BCHW: x_BCHW - x_BCHW.mean((2, 3), keepdim=True), False),
}


@pytest.mark.parametrize("name", STEPS)
def test_dynamic_and_static_scores_in_16_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    step, due = STEPS[name]
    coarse = torch.randint(0, 256, (1, 3, 60, 80)).float()
    example = F.interpolate(coarse[:, :, :16, :16], (64, 64), mode="bicubic").clamp(0, 255).round()
    artifact = muntin.export(Placed(step).eval(), example, tmp_path / "a")
    model = openvino.Core().read_model(model=open_artifact(artifact.path).model_bytes(), weights=b"")
    assert computes_with_sizes(model) == due
    pixels = F.interpolate(coarse, (517, 301), mode="bicubic").clamp(0, 255).round()
    images = pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
    static, dynamic = (muntin.load(artifact.path, threads=1, dynamic=free, cache=False) for free in (False, True))
    error = np.sqrt(np.square(dynamic(images) - static(images)).mean()) / static(images).std()
    assert error < 0.02


@pytest.mark.parametrize("name", ["hybrid-xxs", "torchvision:lraspp_mobilenet_v3_large"])
def test_model_that_only_moves_by_sizes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = (torch.rand(1, 3, 64, 64) * 255).round()
    artifact = muntin.export(muntin.create_model(name, classes=4).eval(), example, tmp_path / "a")
    model: Any = openvino.Core().read_model(model=open_artifact(artifact.path).model_bytes(), weights=b"")
    assert not computes_with_sizes(model)
