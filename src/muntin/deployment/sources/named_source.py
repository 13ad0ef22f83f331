"""Export of a source whose model takes named tensors: token ids, features, several inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from muntin.artifact import Artifact, check_target
from muntin.deployment.capture.named_graph import Axes, NamedTensors, usual_axes
from muntin.deployment.export import export
from muntin.deployment.sources.hugging_face import load_hugging_face
from muntin.deployment.sources.opening import OPENERS, weight_notes
from muntin.deployment.sources.packages import open_factory
from muntin.deployment.sources.source_export import SOURCE, SourceOptions, quantization_of
from muntin.deployment.sources.source_model import Request
from muntin.deployment.sources.weights import load_file
from muntin.errors import ExportError, RecipeError
from muntin.graph.calibration_file import in_batches, read_arrays

NUMBERS = (".npz", ".npy")
"""Endings of the files of named inputs."""
ROWS = 8
"""Rows of a calibration batch."""


def export_named_source(
    source: str, path: Path | None, options: SourceOptions, *, integer: bool, begin: Callable[[], None] = lambda: None
) -> tuple[Artifact, tuple[str, ...]]:
    """Open a model, quantise it unless `integer` is False, and write its artefact of named tensors. Returns it with all notes.

    `options.calibration`: a file of inputs by name, which `forward` takes. Of the integer inputs of `hf` models, the second dimension is
    free, too: it counts tokens.
    """
    given = {"size": options.size, "channels": options.channels, "classes": options.classes, "mean": options.mean, "std": options.std}
    if wrong := [f"--{key}" for key, value in given.items() if value is not None]:
        raise RecipeError(f"{', '.join(wrong)}: of models for pictures, and {options.calibration} holds inputs by name: leave it out")
    if path is None:
        raise ExportError(f"'{source}': give the folder of the artefact by --output FOLDER")
    assert options.calibration is not None
    quantization = quantization_of(options.overrides)
    check_target(path)
    begin()
    model, notes = _open(source, options.weights)
    arrays = read_arrays(options.calibration, list(inspect.signature(model.forward).parameters))
    batches = [
        {name: torch.from_numpy(array) for name, array in batch.items()}
        for batch in in_batches(options.calibration, arrays, ROWS, whole=False)
    ]
    axes = _axes(source, batches[0])
    measured = {SOURCE: source, "source_notes": list(notes)}
    calibration = batches if integer else None
    artifact = export(model, batches[0], path, calibration=calibration, axes=axes, quantization=quantization, measured=measured)
    recorded = artifact.manifest.measured.get("notes")
    return artifact, (*notes, *(map(str, recorded) if isinstance(recorded, list) else ()))


def _open(source: str, file: Path | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model as its package builds it, and what was loaded."""
    if file is not None and not file.is_file():
        raise RecipeError(f"weights {file}: there is no such file")
    kind, _, name = source.partition(":")
    request = Request(weights=file)
    notes: list[str] = []
    if kind == "hf":
        model, weights, notes = load_hugging_face(name, request)
    else:
        opened = OPENERS[kind](name, request) if kind in OPENERS else open_factory(source, request)
        model = opened.model
        weights = opened.weights or (None if file is None else load_file(model, file, unused=opened.unused))
    return model.eval(), (*weight_notes(weights, random=kind in OPENERS), *notes)


def _axes(source: str, example: NamedTensors) -> Axes:
    tokens = source.startswith("hf:")

    def dims(name: str, tensor: Tensor) -> tuple[str | None, ...]:
        batch = usual_axes(example)[name]
        return (batch[0], "tokens") if tokens and tensor.ndim == 2 and not tensor.is_floating_point() else tuple(batch)

    return {name: dims(name, tensor) for name, tensor in example.items()}
