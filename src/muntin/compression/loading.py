"""From a checkpoint to its model, in the form that its compression record describes."""

from __future__ import annotations

from torch import nn

from muntin.compression.batch_norm import FOLDED, apply_folds
from muntin.compression.channels.slimming import apply_widths
from muntin.compression.fold import fold
from muntin.compression.low_rank.factorization import apply_structure
from muntin.compression.quantization.qat import apply_qat
from muntin.compression.rewrite import number_paddings
from muntin.training.checkpoint import Checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.weights import build_model, load_weights


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Build a checkpoint's model with its averaged weights, in `eval` mode.

    Channels are cut, layers factored, norms folded and operations put into quantisation-aware training as the record says; `freeze` makes
    integers of the latter. Raises `CheckpointError` or `MuntinError` if the recipe builds another model than the record describes.
    """
    model, record = build_model(checkpoint.recipe, checkpoint.state.classes).eval(), checkpoint.state.compression
    tensors = checkpoint.tensors[AVERAGE]
    if record is not None:
        apply_widths(model, record.widths)
        number_paddings(model)
        apply_structure(model, record.ranks)
        if record.quantized:
            fold(model)
            apply_folds(model, [change.layer for change in record.changes if change.pass_ == "fold" and change.done == FOLDED], tensors)
            apply_qat(model, record.qat or {})
    load_weights(model, tensors, checkpoint.path / AVERAGE)
    return model.eval()
