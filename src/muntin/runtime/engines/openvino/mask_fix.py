"""Attention masks in a form that OpenVINO computes correctly in 16 bits.

    softmax(scores + mask)        scores (..., I, J), mask (1, ..., 1, J): the same for every row

OpenVINO 2026.4 fuses these into one kernel, which in BF16 and with static sizes ignores a mask of one row: attention of a map in a single
padded window, as of images below 128 x 128, included the padding (0.33 standard deviations of a classifier's scores in the mean, where
rounding makes 0.01; docs/log.md). A mask of the scores' shape is computed correctly.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from muntin.runtime.host.quiet_imports import openvino

LARGEST = 1 << 22
"""Largest number of scores for which a mask is expanded; larger ones are not of a single window."""


def with_whole_masks(model: Any) -> Any:
    """Expands masks of one row to the scores' shape, where that is static. Changes and returns the model."""
    for softmax in [op for op in model.get_ops() if op.get_type_name() == "Softmax"]:
        add = softmax.input(0).get_source_output().get_node()
        if add.get_type_name() != "Add":
            continue
        for index in (0, 1):
            mask, scores = (add.input(place).get_source_output() for place in (index, 1 - index))
            shape = _shape(scores)
            if shape is not None and _is_one_row(_shape(mask), shape) and prod(shape) <= LARGEST:
                whole = openvino.opset13.broadcast(mask, np.array(shape, np.int64))
                add.input(index).replace_source_output(whole.output(0))
    return model


def _shape(output: Any) -> tuple[int, ...] | None:
    shape = output.get_partial_shape()
    return tuple(int(side.get_length()) for side in shape) if shape.is_static else None


def _is_one_row(mask: tuple[int, ...] | None, scores: tuple[int, ...]) -> bool:
    return mask is not None and len(mask) > 0 and mask[-1] == scores[-1] > 1 and prod(mask[:-1]) == 1 < prod(scores[:-1])
