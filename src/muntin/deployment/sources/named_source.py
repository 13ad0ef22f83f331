"""A source whose model takes named tensors: token ids, features, several inputs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from muntin.deployment.capture.named_graph import Axes, NamedTensors, usual_axes
from muntin.deployment.sources.hugging_face import load_hugging_face
from muntin.deployment.sources.opening import OPENERS, weight_notes
from muntin.deployment.sources.packages import open_factory
from muntin.deployment.sources.source_model import Request
from muntin.deployment.sources.weights import load_file
from muntin.errors import RecipeError


def open_named(source: str, file: Path | None) -> tuple[nn.Module, tuple[str, ...]]:
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


def named_axes(source: str, example: NamedTensors) -> Axes:
    """Return the names of the free dimensions of each input."""
    tokens = source.startswith("hf:")

    def dims(name: str, tensor: Tensor) -> tuple[str | None, ...]:
        batch = usual_axes(example)[name]
        return (batch[0], "tokens") if tokens and tensor.ndim == 2 and not tensor.is_floating_point() else tuple(batch)

    return {name: dims(name, tensor) for name, tensor in example.items()}
