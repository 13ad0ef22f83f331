"""New classes at the end of a trained model: its classifier gets more outputs, also when it is factored or in quantisation-aware training.

New rows of weights are random, `NEW_SCORES` as large as the old ones and equal for all pixels of a block; biases, and the scales of a grid
in training, are means. So the new scores are seldom the highest before training, and the old ones are as before. Means of old rows as
weights learn more slowly (docs/log.md). The classifier is found by building the architecture for both numbers of classes: its tensors are
those whose first side differs.

Axes: K classes, O outputs of a layer: K, or K·f² in the order of the classes (`PixelHead`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muntin.artifact.classes import ClassInfo
from muntin.compression.loading import load_model
from muntin.compression.structure import restore_structure
from muntin.errors import CheckpointError
from muntin.training.checkpoint import Checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.weights import build_model, load_weights

NEW_SCORES = 0.25
"""Standard deviation of a new class's initial weights, as a share of the old ones'."""


def grown_model(checkpoint: Checkpoint, classes: tuple[ClassInfo, ...]) -> nn.Module:
    """Build a checkpoint's model with its averaged weights for `classes`, which begin with the checkpoint's; in `eval` mode.

    Raises `CheckpointError` if another tensor than a classifier's depends on the number of classes.
    """
    if len(classes) == len(checkpoint.state.classes):
        return load_model(checkpoint)
    model, record = build_model(checkpoint.recipe, classes).eval(), checkpoint.state.compression
    tensors = checkpoint.tensors[AVERAGE]
    if record is not None:
        restore_structure(model, record, tensors)
    old, new = len(checkpoint.state.classes), len(classes)
    load_weights(model, _grown(tensors, model.state_dict(), old, new, checkpoint.recipe.model.name), checkpoint.path / AVERAGE)
    return model.eval()


def classifier_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, int]:
    """The parameters whose first side has a length for each class, by name, with their old length: of the checkpoint's classes.

    Costs a second model of the architecture.
    """
    classes = checkpoint.state.classes
    more = (*classes, *(ClassInfo(name=f"{classes[0].name} {number}", color=(0, 0, 0)) for number in range(2)))
    grown = {name: len(tensor) for name, tensor in grown_model(checkpoint, more).named_parameters() if tensor.ndim}
    old = checkpoint.tensors[AVERAGE]
    return {name: len(old[name]) for name, _ in model.named_parameters() if name in grown and len(old[name]) != grown[name]}


def _grown(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], old: int, new: int, name: str) -> dict[str, Tensor]:
    """The tensors with rows for new classes."""
    grown: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        due = own.get(key)
        if due is None or due.shape == tensor.shape:
            grown[key] = tensor
            continue
        each, rest = divmod(len(tensor), old) if tensor.ndim else (0, 1)
        if due.shape != (each * new, *tensor.shape[1:]) or rest or not each or not tensor.is_floating_point():
            raise CheckpointError(
                f"'{name}': {key} has the shape {tuple(tensor.shape)} for {old} classes and {tuple(due.shape)} for {new}: only a last "
                "layer with its classes along the first axis can grow: train anew on all classes (`muntin fit`)"
            )
        if tensor.ndim == 1:
            rows = tensor.reshape(old, each).mean(0).repeat(new - old)
        else:
            directions = torch.randn((new - old, *tensor.shape[1:]), generator=torch.Generator().manual_seed(0))
            rows = (NEW_SCORES * float(tensor.std()) * directions).repeat_interleave(each, 0).to(tensor.dtype)
        grown[key] = torch.cat([tensor, rows])
    return grown
