"""Networks that were drawn at random, quantised: what engines compute is what the graph computes exactly.

An engine rewrites a graph of integers by the patterns that it finds, and a wrong rewriting shows in some combination of layers that nobody
has thought of. Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact import ClassInfo, Signature
from muntin.deployment.capture.model_contract import as_bytes
from muntin.deployment.capture.onnx_export import to_onnx
from muntin.graph.float_run import FloatRun
from muntin.graph.quantize import calibrate
from muntin.runtime.host.quiet_imports import openvino

SIGNATURE = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=str(k), color=(k, 0, 0)) for k in range(4)))
NEAR = {"openvino": 0.05, "onnxruntime": 0.1}
"""Root mean square of the error that rounding may make, in standard deviations; ONNX Runtime's fusions sum in another order. What was
wrong was off by 0.1 and more."""

Step = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor]
"""Of the step's layer, the map, the normalised pixels, one of the maps before, and a number that was drawn."""


def _norm(C: int) -> nn.Module:
    norm = nn.BatchNorm2d(C)
    for values in (norm.bias, norm.running_mean):
        nn.init.uniform_(values, -1, 1)  # type: ignore[arg-type]
    return norm


def _half(x: Tensor) -> Tensor:
    return F.interpolate(F.max_pool2d(x, 2, 2), x.shape[2:])


def _shuffled(x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    return x.reshape(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)


def _chunks(x: Tensor, number: float) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([other, one * number], 1)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda C: nn.Conv2d(C, C, 3, padding=1),
    "pointwise": lambda C: nn.Conv2d(C, C, 1),
    "depthwise": lambda C: nn.Conv2d(C, C, 3, padding=1, groups=C),
    "grouped": lambda C: nn.Conv2d(C, C, 3, padding=1, groups=2),
    "joined": lambda C: nn.Conv2d(2 * C, C, 3, padding=1),
    "with pixels": lambda C: nn.Conv2d(C + 3, C, 1),
    "linear": lambda C: nn.Linear(C, C),
    "transposed": lambda C: nn.ConvTranspose2d(C, C, 2, stride=2),
    "strided": lambda C: nn.Conv2d(C, C, 3, stride=2, padding=1),
    "sub-pixel": lambda C: nn.Conv2d(C, 4 * C, 1),
    "norm": _norm,
    "gate": lambda C: nn.Linear(C, C),
}
STEPS: dict[str, Step] = {
    **dict.fromkeys(("conv", "pointwise", "depthwise", "grouped", "norm"), lambda layer, x, pixels, before, number: layer(x)),
    "joined": lambda layer, x, pixels, before, number: layer(torch.cat([x, before], 1)),
    "with pixels": lambda layer, x, pixels, before, number: layer(torch.cat([x, pixels], 1)),
    "linear": lambda layer, x, pixels, before, number: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed": lambda layer, x, pixels, before, number: F.max_pool2d(layer(x), 2),
    "strided": lambda layer, x, pixels, before, number: F.interpolate(layer(x), x.shape[2:], mode="bilinear"),
    "sub-pixel": lambda layer, x, pixels, before, number: F.avg_pool2d(F.pixel_shuffle(layer(x), 2), 2),
    "gate": lambda layer, x, pixels, before, number: x * layer(x.mean((2, 3))).sigmoid()[:, :, None, None],
    "relu": lambda layer, x, pixels, before, number: F.relu(x),
    "leaky": lambda layer, x, pixels, before, number: F.leaky_relu(x, 0.2),
    "silu": lambda layer, x, pixels, before, number: F.silu(x),
    "hardswish": lambda layer, x, pixels, before, number: F.hardswish(x),
    "residual": lambda layer, x, pixels, before, number: x + before,
    "difference": lambda layer, x, pixels, before, number: x - before * number,
    "shifted": lambda layer, x, pixels, before, number: x + number,
    "scaled": lambda layer, x, pixels, before, number: x * (number + 1.5),
    "centred": lambda layer, x, pixels, before, number: x - x.mean((2, 3), keepdim=True),
    "pooled": lambda layer, x, pixels, before, number: _half(x),
    "shuffled": lambda layer, x, pixels, before, number: _shuffled(x),
    "chunks": lambda layer, x, pixels, before, number: _chunks(x, number),
    "padded": lambda layer, x, pixels, before, number: F.pad(x, (1, 0, 1, 0))[:, :, : x.shape[2], : x.shape[3]],
}


class Drawn(nn.Module):
    """A stem, three to seven steps that were drawn, and a head; steps of two inputs take one of the maps before."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw, C = random.Random(seed), (8, 6, 12, 16)[seed % 4]  # noqa: S311
        torch.manual_seed(seed)
        self.plan = [(draw.choice(sorted(STEPS)), draw.randrange(100), draw.uniform(-1, 1)) for _ in range(draw.randint(3, 7))]
        self.stem, self.head = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 4, 1)
        self.steps = nn.ModuleList(LAYERS[kind](C) if kind in LAYERS else nn.Identity() for kind, _, _ in self.plan)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels = (images_BCHW / 255 - 0.45) / 0.225
        maps = [self.stem(pixels)]
        for (kind, which, number), layer in zip(self.plan, self.steps, strict=True):
            maps.append(STEPS[kind](layer, maps[-1], pixels, maps[which % len(maps)], number))
        scores: Tensor = self.head(maps[-1])
        return scores


def check(seed: int) -> None:
    model = Drawn(seed).eval()
    noise = torch.randint(0, 256, (2, 3, 9, 9), generator=torch.Generator().manual_seed(seed)).float()
    example = F.interpolate(noise, (32, 32), mode="bicubic").clamp(0, 255).round()  # as smooth as pictures are
    captured = to_onnx(model, example, SIGNATURE)
    quantized = calibrate(captured, [{"images": as_bytes(example)}], min_sqnr_db=0).quantized().model
    graph = quantized.SerializeToString()
    images = np.ascontiguousarray(example[:1, :, :24, :20].permute(0, 2, 3, 1).to(torch.uint8).numpy())
    wanted = FloatRun(quantized, exact=True)({"images": images})["scores"]
    core: Any = openvino.Core()
    read = core.read_model(model=graph, weights=b"")
    read.reshape(list(images.shape))
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    found = {"openvino": compiled(images)[0], "onnxruntime": onnxruntime.InferenceSession(graph).run(None, {"images": images})[0]}
    for engine, scores in found.items():
        error = float(np.sqrt(np.square(scores - wanted).mean())) / float(wanted.std())
        assert error <= NEAR[engine], f"{engine}, seed {seed}, {[kind for kind, _, _ in model.plan]}: {error:.2g} standard deviations"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int) -> None:
    check(seed)


@pytest.mark.soak
def test_many_random_networks() -> None:
    for seed in range(4, 160):
        check(seed)
