"""The structure that passes gave to a model: read from it for a record, and given to a new model of the same architecture.

Checkpoints of `muntin compress` and folders of `muntin.save` are read by the same functions.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from muntin.compression.channels.sizes import apply_heads, apply_sizes, sizes_of
from muntin.compression.channels.slimming import apply_widths, widths_of
from muntin.compression.channels.split_attention import split_attentions
from muntin.compression.equivalent.batch_norm import FOLDED, apply_folds
from muntin.compression.equivalent.fold import fold
from muntin.compression.equivalent.plain_convolutions import apply_plain, plain_records
from muntin.compression.history import history, pruned_from, remember, remember_pruning
from muntin.compression.low_rank.factorization import apply_structure, structure_of
from muntin.compression.quantization.embeddings import apply_tables, table_structure
from muntin.compression.quantization.qat import apply_qat, qat_structure
from muntin.compression.quantization.quantized_layers import apply_integers, integer_structure
from muntin.compression.rewrite import named
from muntin.compression.sparsity.pattern import apply_patterns, sparse_structure
from muntin.models.compression_record import Structure


def structure_fields(model: nn.Module) -> dict[str, Any]:
    """The fields of `Structure` for a model."""
    pruning = pruned_from(model)
    return {
        "widths": widths_of(model),
        "sizes": {} if pruning is None else sizes_of(model),
        "pruning": pruning,
        "convolutions": plain_records(model),
        "ranks": structure_of(model),
        "qat": qat_structure(model) or None,
        "integers": integer_structure(model),
        "tables": table_structure(model),
        "sparsity": sparse_structure(model),
        "changes": history(model),
    }


def restore_structure(model: nn.Module, record: Structure, tensors: Container[str]) -> None:
    """Give a new model, in `eval` mode, the structure of a record, in place; load the weights next. `tensors`: the names of these weights.

    Channels are cut, layers factored, norms folded and operations quantised, or put into quantisation-aware training, as the record says.
    Raises `MuntinError` if the record is of another model.
    """
    apply_widths(model, record.widths)
    apply_plain(model, record.convolutions)
    if record.pruning is not None:
        split_attentions(model, record.pruning.split)
    apply_structure(model, record.ranks)
    apply_sizes(model, record.sizes)
    if record.pruning is not None:
        apply_heads(model, record.pruning.heads)
    if record.folded:
        bare = [name for name, layer in named(model, nn.Linear, nn.Conv2d) if layer.bias is None]
        fold(model)
        _apply_biases(model, bare, tensors)
        apply_folds(model, [change.layer for change in record.changes if change.pass_ == "fold" and change.done == FOLDED], tensors)
    apply_qat(model, record.qat or {})
    apply_integers(model, record.integers)
    apply_tables(model, record.tables)
    apply_patterns(model, record.sparsity)
    remember(model, record.changes)
    remember_pruning(model, record.pruning)


def _apply_biases(model: nn.Module, bare: Container[str], tensors: Container[str]) -> None:
    """Give the layers that had no bias before norms were folded, `bare`, one exactly where `tensors` has one.

    A norm folded before its layer was factored left its shift in the bias of the last part; folded afterwards, in that of the first.
    """
    for name, layer in dict(model.named_modules()).items():
        if name in bare and isinstance(layer, nn.Linear | nn.Conv2d):
            stored = f"{name}.bias" in tensors
            zeros = torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
            layer.bias = nn.Parameter(zeros) if stored else None
