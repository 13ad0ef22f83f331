"""Masks of attention, written so that OpenVINO computes them rightly in 16 bits.

    softmax(scores + mask)        scores (..., I, J), mask (1, ..., 1, J): what lies outside is hidden from every row alike

OpenVINO 2026.4 fuses these into one kernel. In BF16 and with static sizes that kernel leaves out a mask that is one row for all of the
scores: attention of a map that lies in a single padded window, as of images below 128 x 128, then saw the padding (0.33 standard deviations
of a classifier's scores in the mean, where rounding makes 0.01; docs/log.md). A mask of the scores' own shape is computed rightly.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from muntin.runtime.quiet import openvino

LARGEST = 1 << 22
"""Numbers of a mask that is written whole; scores of that many are of no single window."""


def with_whole_masks(model: Any) -> Any:
    """The same model, which it changes: masks of one row become as large as the scores they are added to, where their sizes are static."""
    for softmax in [op for op in model.get_ops() if op.get_type_name() == "Softmax"]:
        add = softmax.input(0).get_source_output().get_node()
        if add.get_type_name() != "Add":
            continue
        for index in (0, 1):
            mask, scores = (add.input(place).get_source_output() for place in (index, 1 - index))
            wanted = _shape(scores)
            if wanted is not None and _is_one_row(_shape(mask), wanted) and prod(wanted) <= LARGEST:
                whole = openvino.opset13.broadcast(mask, np.array(wanted, np.int64))
                add.input(index).replace_source_output(whole.output(0))
    return model


def _shape(output: Any) -> tuple[int, ...] | None:
    shape = output.get_partial_shape()
    return tuple(int(side.get_length()) for side in shape) if shape.is_static else None


def _is_one_row(mask: tuple[int, ...] | None, scores: tuple[int, ...]) -> bool:
    return mask is not None and len(mask) > 0 and mask[-1] == scores[-1] > 1 and prod(mask[:-1]) == 1 < prod(scores[:-1])
