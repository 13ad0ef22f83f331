"""Cost of an architecture from its shapes alone: parameters, multiply-adds of its layers, bytes. Nothing is measured.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from muntin.models import HybridNet, ModelConfig
from muntin.searching.space import Architecture

_KEPT = 4096


@lru_cache(maxsize=_KEPT)
def layer_counts(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Parameters of the layers of a network by the stride of the map that they are applied to; stride 0: once an image."""
    totals: dict[int, int] = {}
    maps = _strides(config)
    with torch.device("meta"):
        network = HybridNet(config)
    for name, parameter in network.named_parameters():
        stride = _stride(name, config, maps)
        totals[stride] = totals.get(stride, 0) + parameter.numel()
    return tuple(sorted(totals.items()))


def parameters_of(config: ModelConfig) -> int:
    """Number of parameters of a network."""
    return sum(count for _, count in layer_counts(config))


def layer_macs(config: ModelConfig, resolution: float = 1.0) -> float:
    """Multiply-adds of the layers with weights for each pixel of a full-size picture; products of activations do not count."""
    return sum(resolution**2 * count / stride**2 for stride, count in layer_counts(config) if stride)


def artifact_bytes(architecture: Architecture) -> float:
    """Bytes of the weights in 8 bits, a prediction: the graph and the golden pairs of the artefact come on top."""
    return float(parameters_of(architecture.config))


def memory_bytes(architecture: Architecture, side: int) -> float:
    """Bytes of the weights and of the activations at the peak, an estimate from shapes: the layer with the largest input
    and output, and the maps that the decoder waits for, for one picture of `side` pixels a side.

    All in 8 bits.
    """
    side = max(1, round(architecture.resolution * side))
    return float(parameters_of(architecture.config) + _activations(architecture.config, side))


@lru_cache(maxsize=_KEPT)
def _activations(config: ModelConfig, side: int) -> int:
    with torch.device("meta"):
        network = HybridNet(config).eval()
        image = torch.empty(1, config.channels, side, side)
    largest = 0

    def watch(layer: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors))

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(watch)
    with torch.no_grad():
        network(image)
    maps = zip((*config.stem, *config.dims), _strides(config), strict=True)
    waiting = 0 if config.answer.one else sum(c * (side // s) ** 2 for c, s in maps if s >= config.finest)
    return largest + waiting


def _strides(config: ModelConfig) -> tuple[int, ...]:
    """Strides of the maps, from 2 to the coarsest: of the convolutional stages, then of the attention stages."""
    return tuple(2 << index for index in range(len(config.stem) + len(config.dims)))


def _decoder_stride(parts: Sequence[str], config: ModelConfig) -> int:
    """The stride of the map that a layer of the decoder is applied to; 0 for the context, which is applied to a mean.

    `parts`: of the layer's name inside the decoder.
    """
    coarse_first = _strides(config)[::-1]
    if parts[0] == "context":
        return 0
    if parts[0] == "fuse":
        return config.finest
    finer = config.fusion == "progressive" and parts[0] == "smooth"  # the coarsest map is not smoothed
    return coarse_first[int(parts[1]) + finer]


def _stride(name: str, config: ModelConfig, maps: tuple[int, ...]) -> int:
    parts = name.split(".")
    if parts[0] == "stem":
        return 2 if parts[1] == "0" else 4
    if parts[0] in ("stage4", "stage8"):
        return int(parts[0].removeprefix("stage"))
    if parts[0] == "stages":
        return maps[len(config.stem) + int(parts[1])]
    if parts[0] == "decoder":
        return _decoder_stride(parts[1:], config)
    return 0 if config.answer.one else config.finest
