"""Foreign models in thin wrappers with muntin's interface: raw pixels 0-255 of any size in, scores out.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact.answers import ANSWERS, Task
from muntin.errors import DependencyError, MuntinError, RecipeError, install
from muntin.models.eager import check_module

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Statistic = float | Sequence[float]
"""A mean or standard deviation of pixels from 0 to 1: of all channels, or of each."""


class RawPixelModel(nn.Module):
    """Scales raw pixels to 0..1, subtracts `mean`, divides by `std`, and calls the wrapped model: `(x / 255 - mean) / std`.

    Input `(B, channels, H, W)`, float 0-255; output as the wrapped model gives it, which is `model` in names of layers.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("factor", (1 / (255 * torch.tensor(std))).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Any:
        return self.model(image_BCHW * self.factor - self.shift)


class ForeignModel(RawPixelModel):
    """Normalises raw pixels, calls the wrapped model, and resizes the scores of a segmenter to the size of its input.

    Input `(B, channels, H, W)`, float 0-255; output `(B, K)` or `(B, K, H, W)`, by the task.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float], task: Task) -> None:
        super().__init__(model, mean=mean, std=std)
        self.task = task

    def forward(self, image_BCHW: Tensor) -> Tensor:
        out = super().forward(image_BCHW)
        if isinstance(out, tuple):  # GoogLeNet and Inception in training: the answer and auxiliary ones
            out = out[0]
        scores: Tensor = out["out"] if isinstance(out, dict) else out
        if ANSWERS[self.task].masks and scores.shape[2:] != image_BCHW.shape[2:]:
            scores = F.interpolate(scores, image_BCHW.shape[2:], mode="bilinear")
        return scores


def takes_raw_pixels(model: nn.Module, images: object, *, mean: Statistic | None, std: Statistic | None) -> nn.Module:
    """Return the model for raw pixels 0-255: itself without mean and std, otherwise a `RawPixelModel` around it, in its mode and place.

    `images`: a batch (B, C, H, W), which tells the number of channels. `mean`, `std`: see `checked_statistics`. The model is not copied.
    """
    statistics = checked_statistics(mean, std)
    if statistics is None:
        return model
    check_module(model)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise MuntinError("mean and std are of images, and the inputs are none: give batches of raw pixels (B, C, H, W), or leave both out")
    if (count := max(map(len, statistics))) not in (1, images.shape[1]):
        raise MuntinError(
            f"{count} values of mean or std, and the images have {images.shape[1]} channels: give one value, or one for each channel"
        )
    wrapped = RawPixelModel(model, mean=statistics[0], std=statistics[1])
    wrapped.training = model.training  # not `train()`, which changes the modes of its parts
    like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), wrapped.factor)
    wrapped.factor, wrapped.shift = wrapped.factor.to(like), wrapped.shift.to(like)
    return wrapped


def checked_statistics(mean: Statistic | None, std: Statistic | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of each channel, of pixels from 0 to 1; None without them.

    The convention is torchvision's: a model sees `(x / 255 - mean) / std` of raw pixels x. Raises `RecipeError` for one of the two alone,
    different numbers of values, and values of pixels from 0 to 255.
    """
    if mean is None and std is None:
        return None
    means, stds = _values(mean), _values(std)
    given = " and ".join(
        f"{name} {','.join(f'{value:g}' for value in values) or 'none'}" for name, values in (("mean", means), ("std", stds))
    )
    if not means or not stds or len({len(means), len(stds)} - {1}) > 1:
        raise RecipeError(f"{given}: give both, with one value, or one for each channel")
    if not all(0 <= value <= 1 for value in means) or not all(0 < value <= 1 for value in stds):
        raise RecipeError(f"{given}: give those of pixels from 0 to 1; divide those of pixels from 0 to 255 by 255")
    return means, stds


def _values(statistic: Statistic | None) -> tuple[float, ...]:
    if statistic is None:
        return ()
    return (float(statistic),) if isinstance(statistic, int | float) else tuple(map(float, statistic))


class DividedSides(nn.Module):
    """Pads images to multiples of `size_divisor` by repeating the last row and column, and cuts the wrapped model's answer.

    Input and output are the wrapped model's, with any H, W >= 1. Operations over the whole map see the repeated pixels. Raises `ValueError`
    for a divisor below 1. `scale`: size of an answer over that of its input.
    """

    def __init__(self, model: nn.Module, size_divisor: int, *, scale: int = 1) -> None:
        super().__init__()
        if isinstance(size_divisor, bool) or not isinstance(size_divisor, int) or size_divisor < 1:
            raise ValueError(f"size_divisor={size_divisor!r}: give a whole number from 1")
        self.model = model
        self.size_divisor = size_divisor
        self.scale = scale

    def forward(self, image_BCHW: Tensor) -> Tensor:
        H, W = image_BCHW.shape[2:]
        # without a condition, which an exported graph cannot hold
        padded = F.pad(image_BCHW, (0, -W % self.size_divisor, 0, -H % self.size_divisor), mode="replicate")
        scores: Tensor = self.model(padded)
        return scores[:, :, : self.scale * H, : self.scale * W] if isinstance(scores, Tensor) and scores.ndim == 4 else scores


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a mean or standard deviation of each channel: the values, or their average for another number of channels."""
    return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels


def timm_model(name: str, **arguments: Any) -> nn.Module:
    """Create a model of timm with random weights. Raises `RecipeError` for an unknown name; nothing is downloaded."""
    try:
        import timm
    except ImportError as error:
        raise DependencyError(f"'timm:{name}' needs the package timm: {install('train')}") from error
    if ":" in name or "/" in name:
        raise RecipeError(f"'timm:{name}': give the name of an architecture, as timm.list_models() lists them; no model is downloaded")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except (AttributeError, RuntimeError, OSError, TypeError) as error:
        if timm.is_model(name):
            reason, given = " ".join(str(error).split())[:200], ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise RecipeError(f"timm cannot make '{name}' with {given} ({reason}): choose another model") from error
        close = difflib.get_close_matches(name, timm.list_models(), 5, cutoff=0.7)
        raise RecipeError(f"timm does not know a model '{name}'; close: {', '.join(close) or 'none'} (timm.list_models())") from error
    return model


def from_timm(name: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """Create a classifier of timm with random weights."""
    if not ANSWERS[task].one:
        raise RecipeError(
            f"'timm:{name}' is a classifier, not for task '{task}': use task 'classify', or a hybrid with it as model.encoder"
        )
    model: Any = timm_model(name, num_classes=classes, in_chans=channels)
    mean, std = model.default_cfg.get("mean", IMAGENET_MEAN), model.default_cfg.get("std", IMAGENET_STD)
    return ForeignModel(model, mean=for_channels(mean, channels), std=for_channels(std, channels), task=task)


def from_torchvision(name: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """Create a classifier or segmenter of torchvision with random weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise DependencyError(f"'torchvision:{name}' needs the package torchvision: {install('train')}") from error
    if not ANSWERS[task].has_classes:
        raise RecipeError(f"'torchvision:{name}' classifies or segments, not for task '{task}': use a hybrid model")
    known = models.list_models(module=models if ANSWERS[task].one else models.segmentation)
    if name not in known:
        raise RecipeError(f"torchvision has no model '{name}' for task '{task}'; it has {', '.join(known[:8])}, ...")
    if channels != 3:
        raise RecipeError(f"'torchvision:{name}' takes 3 channels, not {channels}: choose a timm or a hybrid model")
    extra = {} if ANSWERS[task].one else {"weights_backbone": None}
    model = models.get_model(name, weights=None, num_classes=classes, **extra)
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task=task)


def from_factory(name: str, *, task: Task, classes: int, channels: int, scale: int = 1) -> nn.Module:
    """Create the user's model: `package.module:factory` is called as `factory(task=..., classes=..., channels=...)`.

    One that enlarges pictures is also given `scale=...`, if it is above 1.

    The model must take raw pixels 0-255 and return scores.
    """
    arguments = {"task": task, "classes": classes, "channels": channels, **({"scale": scale} if scale > 1 else {})}
    *first, last = arguments
    return call_factory(name, arguments, advice=f"write a function that takes {', '.join(first)} and {last} by keyword")


def call_factory(name: str, arguments: Mapping[str, Any], *, advice: str) -> nn.Module:
    """Import `package.module:factory` and call the factory. `advice`: ends the error for a factory that does not take the arguments.

    The module is searched on Python's path, and then in the current folder. Raises `RecipeError` for a name that is not found, and for what
    is no `torch.nn.Module`. Errors inside the factory keep their traceback.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise RecipeError(f"model '{name}': not of the form package.module:factory")
    with _current_folder():
        try:
            factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f"model '{name}': {error}; write package.module:factory, of a package that is installed or lies in the current folder"
            ) from error
        try:
            inspect.signature(factory).bind(**arguments)
        except (TypeError, ValueError) as error:  # ValueError: a built-in without a signature
            raise RecipeError(f"model '{name}': {error}: {advice}") from error
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model '{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _current_folder() -> Iterator[None]:
    """Append the current folder to the import path, which has it for `python -m` but not for an installed command."""
    if "" in sys.path:
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
