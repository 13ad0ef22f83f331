"""Export of a source of models, as `muntin export timm:NAME` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from muntin.artifact import Artifact, check_target, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.deployment.export import export
from muntin.deployment.sizes.requested import Size, parse_sizes
from muntin.deployment.sources.opening import open_model
from muntin.deployment.sources.pictures import generated_pictures, list_pictures
from muntin.errors import ArtifactError, ExportError, RecipeError
from muntin.tasks.classes import ClassSpec, read_specs
from muntin.training.config import QuantizationConfig
from muntin.training.recipe import set_value

SOURCE = "source"
"""Key of the source among the measured figures of a manifest."""


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

    `sizes`: see `parse_sizes`. `begin` is called when work begins.
    Raises `ExportError` without calibration pictures, unless `integer` is False.
    """
    if path is None:
        raise ExportError(f"'{source}': give the folder of the artefact by --output FOLDER")
    if integer and options.calibration is None:
        raise ExportError(f"'{source}': give some pictures by --calibration FOLDER, to quantise with; or --float, to keep all in floats")
    if options.overrides and not integer:
        raise RecipeError("--set says how to quantise, and --float that nothing is: give one of them")
    left_out: tuple[str, ...] = ()
    requested, quantization = None if sizes is None else parse_sizes(sizes), quantization_of(options.overrides)
    if options.calibration is not None:
        _, left_out = list_pictures(options.calibration)  # a missing folder is found before the model is created
    check_target(path)
    begin()
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
    artifact = export(
        opened.model, batches[0], path, calibration=batches if integer else None, signature=opened.signature, sizes=requested,
        quantization=quantization, measured={SOURCE: source, "source_notes": list(notes)},
    )  # fmt: skip
    recorded = artifact.manifest.measured.get("notes")
    return artifact, (*notes, *(map(str, recorded) if isinstance(recorded, list) else ()))


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
