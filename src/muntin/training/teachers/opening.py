"""From a recipe's `teacher.model` to a module whose answers a model learns: a run, an artefact, or a named model with a file of weights.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from muntin.artifact import ClassInfo, Signature, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.errors import MuntinError, RecipeError
from muntin.images.listing import composed
from muntin.models import PRESETS, create_model
from muntin.runtime import Session, load
from muntin.text import count, list_some
from muntin.training.checkpoint import read_checkpoint
from muntin.training.config import TeacherConfig
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.recipe import Recipe
from muntin.training.weights import build_model, load_initial_weights, load_weights

TRAINED_ELSEWHERE = ("timm", "torchvision")
"""Kinds of named models that are random without a file of weights."""


class SessionTeacher(nn.Module):
    """A deployed model as a module without parameters: raw pixels 0-255, `(B, C, H, W)`, to scores on the same device."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels_BHWC = images_BCHW.detach().float().round().clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)
        return torch.from_numpy(self.session(np.ascontiguousarray(pixels_BHWC.numpy()))).to(images_BCHW.device)


def open_teacher(recipe: Recipe, classes: Sequence[ClassInfo], root: Path) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Open a recipe's teacher, and return notes on it; None if the recipe has none. Relative paths start at `root`.

    A teacher knows the recipe's classes, or the first of them, in their order. It is called once, on a black crop. Raises `RecipeError` for
    one that is not found, or answers something else. Costs the teacher's memory; in training a forward pass of it a step.
    """
    config = recipe.teacher
    if config is None:
        return None, ()
    path = root / config.model
    if path.is_dir():
        if config.weights is not None or config.classes is not None:
            given = "weights" if config.weights is not None else "classes"
            raise RecipeError(f"teacher.{given}: {path} holds a trained model with its own weights and classes: leave it out")
        signature, model = _artifact(path, recipe) if (path / MANIFEST).is_file() else _checkpoint(path, trust_code=config.trust_code)
        _check_signature(signature, recipe, classes, path)
        known, notes = len(signature.classes), [f"teacher: {config.model}"]
    else:
        known = len(classes) if config.classes is None else config.classes
        model, notes = _named(config, recipe, known, len(classes), root)
    fault = _fault(model.eval(), recipe, known)
    if fault:
        raise RecipeError(f"teacher.model {config.model}: {fault}")
    if known < len(classes):
        unknown = list_some([entry.name for entry in classes[known:]])
        notes.append(f"the teacher knows {known} of the {len(classes)} classes: it says nothing about {unknown}")
    return model, tuple(notes)


def _checkpoint(path: Path, *, trust_code: bool) -> tuple[Signature, nn.Module]:
    """The averaged weights of a run of `muntin fit`."""
    checkpoint = read_checkpoint(path, trust_code=trust_code)
    if checkpoint.state.compression is not None:
        raise RecipeError(f"teacher.model {path}: a compressed checkpoint: give the run that it was made from, or its artefact")
    model = build_model(checkpoint.recipe, checkpoint.state.classes)
    load_weights(model, checkpoint.tensors[AVERAGE], checkpoint.path / AVERAGE)
    return checkpoint.recipe.signature(checkpoint.state.classes), model  # by the names in training, as the recipe's


def _artifact(path: Path, recipe: Recipe) -> tuple[Signature, nn.Module]:
    signature = open_artifact(path).manifest.signature
    if not isinstance(signature, Signature):
        raise RecipeError(f"teacher.model {path}: an artefact of named tensors, not of pictures: give a model of task {recipe.task}")
    session = load(path, threads=recipe.training.threads, shapes=())
    return signature, SessionTeacher(session)


def _check_signature(signature: Signature, recipe: Recipe, classes: Sequence[ClassInfo], path: Path) -> None:
    """Raise `RecipeError` for a teacher of another task, of other channels, or of other classes than the recipe's first ones."""
    if (signature.task, signature.channels) != (recipe.task, recipe.data.channels):
        raise RecipeError(
            f"teacher.model {path}: a model of task {signature.task} with {count(signature.channels, 'channel')}, and the recipe has task "
            f"{recipe.task} with {recipe.data.channels}: give a teacher of the same"
        )
    theirs, ours = [entry.name for entry in signature.classes], [entry.name for entry in classes]
    if [composed(name) for name in theirs] != [composed(name) for name in ours[: len(theirs)]]:
        raise RecipeError(
            f"teacher.model {path} has {count(len(theirs), 'class')} ({list_some(theirs, 5)}), and the recipe {len(ours)} "
            f"({list_some(ours, 5)}): a teacher knows the recipe's classes, or the first of them, in their order: reorder data.classes"
        )


def _named(config: TeacherConfig, recipe: Recipe, known: int, classes: int, root: Path) -> tuple[nn.Module, list[str]]:
    """A model by name with its weights."""
    kind = config.model.partition(":")[0]
    if ":" not in config.model and config.model not in PRESETS:
        raise RecipeError(
            f"teacher.model {config.model}: {root / config.model} is no folder (relative paths start at the recipe's folder), and it is no "
            "model's name: give a run, a checkpoint or an artefact, or timm:NAME, torchvision:NAME, a preset or package.module:factory"
        )
    if config.classes is not None and not recipe.answer.has_classes:
        raise RecipeError(f"teacher.classes {config.classes}: {recipe.task} has no classes: leave it out")
    if known > classes:
        raise RecipeError(f"teacher.classes {known}: the recipe has {classes}: a teacher knows the recipe's classes, or the first of them")
    if config.weights is None and (kind in TRAINED_ELSEWHERE or config.model in PRESETS):
        raise RecipeError(f"teacher.model {config.model}: it has random weights: name its .safetensors file by teacher.weights")
    model = create_model(
        config.model, task=recipe.task, classes=max(1, known), channels=recipe.data.channels, scale=recipe.data.output_scale
    )
    if config.weights is None:
        return model, [f"teacher: {config.model}, with the weights that it is made with"]
    notes = load_initial_weights(model, root / config.weights, setting="teacher.weights", whole=True)
    return model, [f"teacher: {config.model}", *notes]


@torch.no_grad()
def _fault(model: nn.Module, recipe: Recipe, known: int) -> str:
    """Describe a fault in a teacher's answer to a crop; empty if there is none."""
    side = recipe.data.crop
    try:
        answer = model(torch.zeros(1, recipe.data.channels, side, side))
    except (AssertionError, MuntinError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"it fails on a crop of data.crop {side} ({reason}): take another crop, or a teacher that takes any size"
    large = recipe.data.output_scale * side
    outputs = recipe.answer.width(known, recipe.data.channels)
    expected = (1, outputs) if recipe.answer.one else (1, outputs, large, large)
    if not isinstance(answer, Tensor) or tuple(answer.shape) != expected:
        received = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        return f"it answers {received} to a crop of {side} x {side}, not {expected}: give one of the recipe's task, classes and channels"
    return ""
