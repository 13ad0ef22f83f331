"""New classes at the end of a trained model: its classifier gets more outputs, also when it is factored or in quantisation-aware training.

The new scores start as the mean of the old ones, which is never above the highest of them: the grown model answers as before until it is
trained. The classifier is found by building the architecture for both numbers of classes: its tensors are those whose first side differs.

Axes: K classes, O outputs of a layer: K, or K·f² in the order of the classes (`PixelHead`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muntin.artifact.classes import ClassInfo
from muntin.compression.loading import load_model
from muntin.compression.quantization.fake_quantization import weight_scale
from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.rewrite import named
from muntin.compression.structure import restore_structure
from muntin.errors import CheckpointError
from muntin.training.checkpoint import Checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.weights import build_model, load_weights


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
    _renew_scales(model, tensors)
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
    """The tensors with rows for new classes, each the mean of the old classes' rows."""
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
        mean = tensor.reshape(old, each, *tensor.shape[1:]).mean(0)
        grown[key] = torch.cat([tensor, mean.repeat(new - old, *(1 for _ in tensor.shape[1:]))])
    return grown


def _renew_scales(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give the new rows of layers in quantisation-aware training scales that suit their weights."""
    for name, layer in named(model, QATLinear, QATConv2d):
        assert isinstance(layer, QATLinear | QATConv2d)
        rows = len(before[f"{name}.log_scale"])
        if rows < len(layer.log_scale):
            with torch.no_grad():
                layer.log_scale[rows:] = weight_scale(layer.weight, 0, layer.bits).log()[rows:]
