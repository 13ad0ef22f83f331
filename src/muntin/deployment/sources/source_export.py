"""Export of a source of models, as `muntin export timm:NAME` does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from muntin.artifact import Artifact, check_target, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.deployment.export import SOURCE, export
from muntin.deployment.sizes.requested import Size, parse_sizes
from muntin.deployment.sources.named_source import named_axes, open_named
from muntin.deployment.sources.opening import OpenedModel, open_model
from muntin.deployment.sources.pictures import generated_pictures, list_pictures
from muntin.errors import ArtifactError, ExportError, RecipeError
from muntin.graph.calibration_file import in_batches, read_arrays
from muntin.tasks.classes import ClassSpec, read_specs
from muntin.training.config import QuantizationConfig
from muntin.training.recipe import set_value

NUMBERS = (".npz", ".npy")
"""Endings of the files of named inputs."""
ROWS = 8
"""Rows of a calibration batch of named inputs."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of the command line for a source. `mean` and `std`: numbers with commas; `classes`: a file of names, or how many.

    `size`: a side, or HEIGHTxWIDTH. `overrides`: `quantization.KEY=VALUE`.
    """

    weights: Path | None = None
    calibration: Path | None = None
    size: str | None = None
    channels: int | None = None
    classes: str | None = None
    mean: str | None = None
    std: str | None = None
    overrides: Sequence[str] = ()


def export_source(
    source: str, path: Path | None, options: SourceOptions, *, integer: bool, sizes: str | None, begin: Callable[[], None] = lambda: None
) -> tuple[Artifact, tuple[str, ...]]:
    """Open a model, quantise it unless `integer` is False, and write the artefact. Returns it with the notes of both steps.

    `sizes`: see `parse_sizes`. `begin` is called when work begins. With a file of inputs by name as `options.calibration`, which `forward`
    takes, the artefact has these inputs; of integers of `hf` models the second dimension is free, too: it counts tokens.
    Raises `ExportError` without calibration, unless `integer` is False, and `RecipeError` for options that do not fit.
    """
    if path is None:
        raise ExportError(f"'{source}': give the folder of the artefact by --output FOLDER")
    named = options.calibration is not None and options.calibration.suffix.lower() in NUMBERS
    if named:
        _refuse_of_pictures(options, sizes)
    elif integer and options.calibration is None:
        raise ExportError(f"'{source}': give some pictures by --calibration FOLDER, to quantise with; or --float, to keep all in floats")
    if options.overrides and not integer:
        raise RecipeError("--set says how to quantise, and --float that nothing is: give one of them")
    left_out: tuple[str, ...] = ()
    requested, quantization = None if sizes is None else parse_sizes(sizes), quantization_of(options.overrides)
    if options.calibration is not None and not named:
        _, left_out = list_pictures(options.calibration)  # a missing folder is found before the model is created
    check_target(path)
    begin()
    model, batches, notes, details = _named(source, options) if named else _of_pictures(source, options, quantization, left_out)
    artifact: Artifact = export(
        model, batches[0], path, calibration=batches if integer else None, quantization=quantization,
        measured={SOURCE: source, "source_notes": list(notes)}, sizes=requested, **details,
    )  # fmt: skip
    recorded = artifact.manifest.measured.get("notes")
    return artifact, (*notes, *(map(str, recorded) if isinstance(recorded, list) else ()))


def _refuse_of_pictures(options: SourceOptions, sizes: str | None) -> None:
    given = {name: getattr(options, name) for name in ("size", "channels", "classes", "mean", "std")} | {"sizes": sizes}
    if wrong := [f"--{name}" for name, value in given.items() if value is not None]:
        raise RecipeError(f"{', '.join(wrong)}: of models for pictures, and {options.calibration} holds inputs by name: leave it out")


_OpenedSource = tuple[nn.Module | OpenedModel, list[Any], tuple[str, ...], dict[str, Any]]
"""A model, its calibration batches, notes, and further arguments of `export`."""


def _of_pictures(source: str, options: SourceOptions, quantization: QuantizationConfig | None, left_out: Iterable[str]) -> _OpenedSource:
    opened = open_model(
        source, options.weights, size=_size(options.size), channels=options.channels, classes=_classes(options.classes),
        mean=_numbers("--mean", options.mean), std=_numbers("--std", options.std),
    )  # fmt: skip
    notes = opened.notes
    if options.calibration is None:
        batches = [generated_pictures(opened.channels, opened.size)]
        notes += ("the golden answers are to generated pictures: --calibration FOLDER gives others",)
    else:
        batches = opened.pictures(options.calibration, (quantization or QuantizationConfig()).calibration_images)
        notes += (f"pictures of {options.calibration}: {sum(map(len, batches))} used", *left_out)
    return opened, batches, notes, {}


def _named(source: str, options: SourceOptions) -> _OpenedSource:
    assert options.calibration is not None
    model, notes = open_named(source, options.weights)
    arrays = read_arrays(options.calibration, list(inspect.signature(model.forward).parameters))
    batches = [
        {name: torch.from_numpy(array) for name, array in batch.items()}
        for batch in in_batches(options.calibration, arrays, ROWS, whole=False)
    ]
    return model, batches, notes, {"axes": named_axes(source, batches[0])}


def replaced_artifact(path: Path) -> str | None:
    """Describe the artefact that an export to `path` would replace. None without one."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        manifest = open_artifact(path).manifest
    except ArtifactError as error:
        return f"unreadable: {error}"
    return f"{manifest.measured.get(SOURCE) or 'an artefact'}, exported {manifest.created}"


def _size(text: str | None) -> int | Size | None:
    parts = [] if text is None else text.lower().split("x")
    if text is not None and (len(parts) > 2 or not all(part.strip().isdecimal() for part in parts)):
        raise RecipeError(f"--size {text}: give a side in pixels, or HEIGHTxWIDTH, for example 224 or 384x512")
    sides = [int(part) for part in parts]
    return None if not sides else sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{option} {text}: give a number for each channel, with commas, for example 0.485,0.456,0.406") from error


def _classes(text: str | None) -> int | list[ClassSpec] | None:
    """Return how many classes, or those of a file."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    return read_specs(Path(text))


def quantization_of(overrides: Iterable[str]) -> QuantizationConfig | None:
    """Return the configuration with `quantization.KEY=VALUE` replaced; None without overrides."""
    content: dict[str, object] = {}
    for override in overrides:
        if not override.startswith("quantization."):
            raise RecipeError(f"'{override}': only quantization.KEY=VALUE can be set here")
        set_value(content, override)
    try:
        return QuantizationConfig.model_validate(content["quantization"]) if content else None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(QuantizationConfig.model_fields)
        raise RecipeError(f"quantization.{'.'.join(map(str, first['loc']))}: {first['msg']}; keys are {known}") from error
