"""Workarounds: dynamic sizes give the scores of static ones."""

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
from muntin.runtime.engines.openvino.workarounds import TINY, computes_with_sizes, with_biases
from muntin.runtime.host.quiet_imports import openvino

opset = openvino.opset13


class Residual(nn.Module):
    """A convolution, or a Linear, whose answer is read twice."""

    def __init__(self, *, bias: bool, linear: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm, self.linear = nn.GroupNorm(4, 16), linear
        self.layer = nn.Linear(16, 16, bias=bias) if linear else nn.Conv2d(16, 16, 3, 1, 1, bias=bias)
        if bias:
            nn.init.zeros_(self.layer.bias)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.stem(pixels_BCHW / 255 - 0.5)
        y = torch.relu(self.norm(x))
        y = self.layer(y.movedim(1, -1)).movedim(-1, 1) if self.linear else self.layer(y)
        x = x + y
        x = x + self.norm(x)
        return F.interpolate(self.head(x), size=pixels_BCHW.shape[2:])


@pytest.mark.usefixtures("group_norms")
@pytest.mark.parametrize(("bias", "linear"), [(False, False), (True, True)])
def test_dynamic_and_static_scores_in_8_bits(tmp_path: Path, bias: bool, linear: bool) -> None:
    torch.manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 16, 16)).float()
    example = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 255).round()
    artifact = muntin.export(Residual(bias=bias, linear=linear).eval(), example, tmp_path / "a", calibration=[example], sizes="any")
    assert sum(layer.activation_bits == 8 for layer in artifact.manifest.layers) >= 2
    images = example[:, :, :50, :38].permute(0, 2, 3, 1).to(torch.uint8).numpy()
    static, dynamic = (muntin.load(artifact.path, precision="f32", threads=1, dynamic=dynamic) for dynamic in (False, True))
    due = static(images)
    error = dynamic(images) - due  # a value on the border of two integers may be rounded either way
    assert float(np.sqrt(np.square(error).mean())) < 0.01 * float(due.std())


def adds(model: Any) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() == "Add"]


@pytest.mark.parametrize(("bias", "added"), [(None, True), (0.0, True), (0.5, False)])
def test_product_with_a_bias(bias: float | None, added: bool) -> None:
    images = opset.parameter([1, 3, -1, -1], np.float32)
    answer = opset.convolution(images, opset.constant(np.ones((5, 3, 1, 1), np.float32)), [1, 1], [0, 0], [0, 0], [1, 1])
    if bias is not None:
        answer = opset.add(answer, opset.constant(np.full((1, 5, 1, 1), bias, np.float32)))
    model = with_biases(openvino.Model([answer], [images]))
    biases = [op.input(1).get_source_output().get_node().get_data() for op in adds(model)]
    assert len(biases) == (bias is not None) + added
    assert any(np.all(value == TINY) for value in biases) == added


def test_product_of_two_activations() -> None:
    one, other = (opset.parameter([1, -1, 8], np.float32) for _ in range(2))
    model = openvino.Model([opset.matmul(one, other, False, True)], [one, other])
    assert not adds(with_biases(model))


def waves(x_BCHW: Tensor) -> Tensor:
    places = torch.arange(x_BCHW.shape[3], device=x_BCHW.device)
    return x_BCHW + torch.sin(places / 10.0)


def sampled(x_BCHW: Tensor) -> Tensor:
    B, _, H, W = x_BCHW.shape
    y_H, x_W = ((torch.arange(side) + 0.5) / side * 1.8 - 0.9 for side in (H, W))
    grid_BHW2 = torch.stack([x_W[None, None].expand(B, H, W), y_H[None, :, None].expand(B, H, W)], -1)
    return F.grid_sample(x_BCHW, grid_BHW2, align_corners=False, padding_mode="border")


def gated(x_BCHW: Tensor) -> Tensor:
    """As in torchvision's lraspp."""
    return x_BCHW * F.interpolate(F.adaptive_avg_pool2d(x_BCHW, 1).sigmoid(), size=x_BCHW.shape[2:], mode="bilinear")


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
    "gated": (gated, False),
    "mean": (lambda x_BCHW: x_BCHW - x_BCHW.mean((2, 3), keepdim=True), False),
}


@pytest.mark.parametrize("name", STEPS)
def test_dynamic_and_static_scores_in_16_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    step, due = STEPS[name]
    coarse = torch.randint(0, 256, (1, 3, 60, 80)).float()
    example = F.interpolate(coarse[:, :, :16, :16], (64, 64), mode="bicubic").clamp(0, 255).round()
    artifact = muntin.export(Placed(step).eval(), example, tmp_path / "a", sizes="any")
    model = openvino.Core().read_model(model=open_artifact(artifact.path).model_bytes(), weights=b"")
    assert computes_with_sizes(model) == due
    pixels = F.interpolate(coarse, (517, 301), mode="bicubic").clamp(0, 255).round()
    images = pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
    static, dynamic = (muntin.load(artifact.path, threads=1, dynamic=free, cache=False) for free in (False, True))
    error = np.sqrt(np.square(dynamic(images) - static(images)).mean()) / static(images).std()
    assert error < 0.02
