"""From a checkpoint to its model, in the form that its compression record describes."""

from __future__ import annotations

from torch import nn

from muntin.compression.structure import restore_structure
from muntin.errors import CheckpointError
from muntin.models import PRESETS
from muntin.training.checkpoint import Checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.weights import build_model, load_weights


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Build a checkpoint's model with its averaged weights, in `eval` mode.

    It has the structure that the record says; `freeze` makes integers of operations in quantisation-aware training. Raises
    `CheckpointError` or `MuntinError` if the recipe builds another model than the record describes.
    """
    model, record = build_model(checkpoint.recipe, checkpoint.state.classes).eval(), checkpoint.state.compression
    tensors = checkpoint.tensors[AVERAGE]
    if record is not None:
        restore_structure(model, record, tensors)
    try:
        load_weights(model, tensors, checkpoint.path / AVERAGE)
    except CheckpointError as error:
        name = checkpoint.recipe.model.name
        if checkpoint.state.structure is not None or name not in PRESETS:
            raise
        raise CheckpointError(
            f"{error}; muntin 0.1 did not record the structure of {name}: if the preset has changed, use the version that trained it"
        ) from error
    return model.eval()
