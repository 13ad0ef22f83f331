"""The network for double size in npm's package @upscalerjs/esrgan-slim (MIT), with its weights, a peer of restoration.

    mkdir -p runs/esrgan-slim && cd runs/esrgan-slim && npm pack @upscalerjs/esrgan-slim && tar xzf *.tgz

A residual dense network (Zhang et al., 1802.08797: one convolution in each of two blocks) trained on DIV2K. The package holds it as a
layers model of TensorFlow.js: a graph of Keras layers and one file of 32-bit floats.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

PACKAGE = Path("runs/esrgan-slim/package")
"""Where the package is unpacked, from the working directory."""


class KerasGraph(nn.Module):
    """Raw pixels `(B, 3, H, W)` to a picture of twice the sides, layer by layer as the file lists them."""

    def __init__(self, layers: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.steps = [(layer["class_name"], layer["name"], [node[0] for node in (layer["inbound_nodes"] or [[]])[0]]) for layer in layers]
        self.convolutions = nn.ModuleDict()
        for kind, name, _ in self.steps:
            if kind == "Conv2D":
                kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)
                convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding="same")
                convolution.load_state_dict({"weight": kernel, "bias": weights[f"{name}/bias"]})
                self.convolutions[name] = convolution

    def forward(self, image_BCHW: Tensor) -> Tensor:
        made: dict[str, Tensor] = {}
        out_BCHW = image_BCHW
        for kind, name, before in self.steps:
            given = [made[one] for one in before]
            if kind == "InputLayer":
                out_BCHW = image_BCHW
            elif kind == "Conv2D":
                out_BCHW = self.convolutions[name](given[0])
            elif kind == "Activation":
                out_BCHW = F.relu(given[0])
            elif kind == "Concatenate":
                out_BCHW = torch.cat(given, 1)
            elif kind == "Add":
                out_BCHW = given[0] + given[1]
            elif kind == "UpSampling2D":
                out_BCHW = F.interpolate(given[0], scale_factor=2.0, mode="nearest")
            else:
                raise ValueError(f"layer {name} is {kind}: {PACKAGE} is of another version")
            made[name] = out_BCHW
        return out_BCHW


def slim(*, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
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
