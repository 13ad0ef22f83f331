"""Peers of restoration: small NAFNets, and the network for double size of npm's package @upscalerjs/esrgan-slim (MIT), with its weights.

NAFNet: Chen et al., "Simple Baselines for Image Restoration" (2204.04676, sections 3 and 4), a U-Net of blocks without activation
functions. Deviation: one block a level, three levels; pixels are 0-255; for a larger output the last layer shuffles to it, and the
residual is the input enlarged bilinearly.

ESRGAN: a residual dense network (Zhang et al., 1802.08797: one convolution in each of two blocks) trained on DIV2K. The package holds it
as a layers model of TensorFlow.js: a graph of Keras layers and one file of 32-bit floats. It is unpacked by

    mkdir -p runs/esrgan-slim && cd runs/esrgan-slim && npm pack @upscalerjs/esrgan-slim && tar xzf *.tgz

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

LEVELS = 3
DIVISOR = 1 << LEVELS
"""Sides are multiples of it (`model.size_divisor`)."""
PACKAGE = Path("runs/esrgan-slim/package")
"""The unpacked ESRGAN, from the working directory."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class GatedBlock(nn.Module):
    """Depthwise convolution, product of halves, channel attention; then an MLP with a product of halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.depthwise(self.expand(self.norm1(x_BCHW))).chunk(2, 1)
        gated = first * second
        gated = gated * self.attention(gated.mean((2, 3), keepdim=True))
        x_BCHW = x_BCHW + self.beta * self.project(gated)
        first, second = self.widen(self.norm2(x_BCHW)).chunk(2, 1)
        return x_BCHW + self.gamma * self.narrow(first * second)


class NAFNet(nn.Module):
    """Raw pixels `(B, C, H, W)`, sides divisible by `DIVISOR`, to an image of `scale` times the sides."""

    def __init__(self, width: int, *, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        widths = [width << level for level in range(LEVELS)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.encoders = nn.ModuleList(GatedBlock(c) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths)
        self.middle = GatedBlock(2 * widths[-1])
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2)) for c in widths[::-1])
        self.decoders = nn.ModuleList(GatedBlock(c) for c in widths[::-1])
        self.last = nn.Conv2d(width, channels * scale**2, 3, padding=1)
        self.shuffle: nn.Module = nn.PixelShuffle(scale) if scale > 1 else nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.first(image_BCHW / 64 - 127.5 / 64)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x_BCHW = encoder(x_BCHW)
            skips.append(x_BCHW)
            x_BCHW = down(x_BCHW)
        x_BCHW = self.middle(x_BCHW)
        for up, decoder, skip in zip(self.ups, self.decoders, skips[::-1], strict=True):
            x_BCHW = decoder(up(x_BCHW) + skip)
        residual = 64 * self.shuffle(self.last(x_BCHW))
        given = image_BCHW if self.scale == 1 else F.interpolate(image_BCHW, scale_factor=float(self.scale), mode="bilinear")
        return given + residual


def _nafnet(width: int, *, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    return NAFNet(width, channels=channels, scale=scale)


nafnet_16, nafnet_32 = partial(_nafnet, 16), partial(_nafnet, 32)
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Activation": F.relu,
    "Concatenate": lambda *maps_BCHW: torch.cat(maps_BCHW, 1),
    "Add": torch.add,
    "UpSampling2D": lambda x_BCHW: F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"),
}
"""Keras layers without weights."""


class KerasGraph(nn.Module):
    """Raw pixels `(B, 3, H, W)` to an image of twice the sides, layer by layer as the file lists them."""

    def __init__(self, layers: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.steps = [(layer["class_name"], layer["name"], [node[0] for node in (layer["inbound_nodes"] or [[]])[0]]) for layer in layers]
        self.convolutions = nn.ModuleDict()
        for name in (name for kind, name, _ in self.steps if kind == "Conv2D"):
            kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)
            convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding="same")
            convolution.load_state_dict({"weight": kernel, "bias": weights[f"{name}/bias"]})
            self.convolutions[name] = convolution

    def forward(self, image_BCHW: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = {}
        for kind, name, sources in self.steps:
            inputs = [outputs[source] for source in sources]
            if kind == "InputLayer":
                outputs[name] = image_BCHW
            elif kind == "Conv2D":
                outputs[name] = self.convolutions[name](*inputs)
            elif kind in OPERATIONS:
                outputs[name] = OPERATIONS[kind](*inputs)
            else:
                raise ValueError(f"layer {name} is {kind}: {PACKAGE} is of another version")
        return outputs[self.steps[-1][1]]


def esrgan_slim(*, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    """Create the model with the weights of `PACKAGE`."""
    folder = PACKAGE / "models" / "x2"
    content = json.loads((folder / "model.json").read_text())
    (group,) = content["weightsManifest"]
    values = np.concatenate([np.fromfile(folder / path, dtype="<f4") for path in group["paths"]])
    weights, start = {}, 0
    for entry in group["weights"]:
        end = start + int(np.prod(entry["shape"]))
        weights[entry["name"]] = torch.from_numpy(values[start:end].reshape(entry["shape"]).copy())
        start = end
    return KerasGraph(content["modelTopology"]["model_config"]["config"]["layers"], weights)
