"""`create_model`: a model by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError
from torch import nn

from muntin.artifact.answers import Task
from muntin.errors import RecipeError
from muntin.models.config import PRESETS, ModelConfig
from muntin.models.foreign import DividedSides, from_factory, from_timm, from_torchvision
from muntin.models.hybridnet import HybridNet

ARGUMENTS = ("task", "classes", "channels", "scale", "encoder")
"""Fields of `ModelConfig` that are no options, but arguments of `create_model`."""
REPLACED = ("stem", "pairs")
"""Options of the convolutions that an encoder replaces."""
FOREIGN: dict[str, Callable[..., nn.Module]] = {"timm": from_timm, "torchvision": from_torchvision}


def create_model(
    name: str,
    *,
    task: Task = "segment",
    classes: int = 2,
    channels: int = 3,
    scale: int = 1,
    options: dict[str, Any] | None = None,
    size_divisor: int = 1,
    encoder: str | None = None,
) -> nn.Module:
    """Create a model by name, initialised from PyTorch's global random generator.

    `name`: a preset (`muntin models` lists them), `timm:NAME`, `torchvision:NAME`, or `package.module:factory`. `options`: fields of
    `ModelConfig` that replace the preset's. `size_divisor`: see `DividedSides`. `encoder`: `timm:NAME`, a network that takes the place of a
    hybrid's convolutional stages (see `Encoder`), with random weights, too. The model takes raw pixels, float 0-255,
    `(B, channels, H, W)` and returns scores `(B, classes, H, W)`, `(B, classes)` or an image `(B, channels, scale·H, scale·W)`. Raises
    `RecipeError` for an unknown name or impossible values.
    """
    if ":" in name:
        if encoder is not None:
            raise RecipeError(f"encoder {encoder} is for hybrid models; '{name}' has its own: leave it out, or take a preset")
        if options:
            raise RecipeError(f"options {', '.join(options)} are for hybrid models; '{name}' takes none")
        kind, _, rest = name.partition(":")
        if scale != 1 and kind in FOREIGN:
            raise RecipeError(f"scale={scale} is for hybrid models and factories; '{name}' answers at the input's size: use scale=1")
        _checked(name, task=task, classes=classes, channels=channels, scale=scale)
        arguments: dict[str, Any] = {"task": task, "classes": classes, "channels": channels}
        model = FOREIGN[kind](rest, **arguments) if kind in FOREIGN else from_factory(name, **arguments, scale=scale)
        try:
            return model if size_divisor == 1 else DividedSides(model, size_divisor, scale=scale)
        except ValueError as error:
            raise RecipeError(str(error)) from error
    if size_divisor != 1:
        raise RecipeError(f"size_divisor={size_divisor} is for models that refuse some sizes; '{name}' takes all: leave it out")
    return HybridNet(
        preset_config(name, task=task, classes=classes, channels=channels, scale=scale, options=options or {}, encoder=encoder)
    )


def preset_config(
    name: str, *, task: Task, classes: int, channels: int, scale: int, options: dict[str, Any], encoder: str | None
) -> ModelConfig:
    """Return the structure of a preset with the options of a recipe, as of `create_model`."""
    if name not in PRESETS:
        known = f"{', '.join(PRESETS)}, timm:NAME, torchvision:NAME, package.module:factory"
        raise RecipeError(f"unknown model '{name}': {_nearest(name, PRESETS)}known: {known}")
    _check_options(name, options)
    if unused := [key for key in REPLACED if encoder is not None and key in options]:
        raise RecipeError(f"model '{name}': options {', '.join(unused)} are of the convolutions that an encoder replaces: leave them out")
    fields = {**PRESETS[name], **options, "encoder": encoder}
    return _checked(name, task=task, classes=classes, channels=channels, scale=scale, **fields)


def preset_options(config: ModelConfig) -> dict[str, Any]:
    """Return all options of a structure, which make it from any preset."""
    return config.model_dump(mode="json", exclude={*ARGUMENTS, *(REPLACED if config.encoder is not None else ())})


def _checked(name: str, **fields: Any) -> ModelConfig:
    """Check the values, with the same bounds for every model."""
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "model"
        raise RecipeError(f"model '{name}', {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean '{near[0]}'? " if near else ""


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raise `RecipeError` for an option that is no field of `ModelConfig`, or that `create_model` has an argument for."""
    allowed = [field for field in ModelConfig.model_fields if field not in ARGUMENTS]
    for key in options:
        if key in ARGUMENTS:
            raise RecipeError(f"model '{name}': '{key}' is not an option: give it beside the model's name")
        if key not in allowed:
            raise RecipeError(f"model '{name}': unknown option '{key}': {_nearest(key, allowed)}known: {', '.join(allowed)}")
