"""Request to a source of models, and the model that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from muntin.deployment.sizes.requested import Size

ChannelStatistics = tuple[float, ...]
"""A mean or standard deviation of each channel, of pixels from 0 to 1."""
DEFAULT_SIZE = (224, 224)
"""Size of the pictures where neither the user nor the package gives one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Values that the user gave. None: the package's own.

    `classes`: number of outputs. `weights`: file of weights, which `open_model` loads.
    """

    classes: int | None = None
    channels: int | None = None
    size: Size | None = None
    normalised: bool = False
    """True if the user gave mean and standard deviation."""
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """The file or folder of a model's weights, how many tensors are from it, and the tensors of it that are not in the model."""

    path: Path
    tensors: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model as its package builds it.

    `mean` and `std`: of pixels from 0 to 1; red first; empty for a model that takes raw pixels. `bgr`: the model takes blue first.
    `unused`: beginnings of the names of tensors that only training uses; a file of weights may hold them. `weights`: None for random ones.
    """

    model: nn.Module
    channels: int
    size: Size
    mean: ChannelStatistics = ()
    std: ChannelStatistics = ()
    class_names: tuple[str, ...] = ()
    bgr: bool = False
    unused: tuple[str, ...] = ()
    weights: LoadedWeights | None = None
    notes: tuple[str, ...] = ()
