"""Rewrites a model's last step for OpenVINO: scores with one pass less, or labels instead of scores.

exported    channels -> pixels (DepthToSpace) -> crop
scores      the same, by one permutation from channels last
labels      the best class, channels last -> pixels -> crop
"""

from __future__ import annotations

from typing import Any

import numpy as np

from muntin.runtime.host.quiet_imports import openvino


def ending_in_labels(model: Any, label_type: np.dtype[Any]) -> Any:
    """The model with the index of the highest score as its output, of an unsigned type, instead of the scores.

    A pixel shuffle (and a crop) at the end is done to the labels instead of the scores: one byte instead of four for each class. Classes
    are compared channels last, as the engine keeps maps; otherwise it would reorder all scores first, 400 MB at 4096 x 4096.
    """
    opset = openvino.opset13
    shuffle, crops = _end(model)
    if shuffle is None:
        return _with_output(model, opset.squeeze(_best(_last(model), 1, label_type), opset.constant(np.int64(1))))
    inside = shuffle.get_attributes()["block_size"] ** 2
    labels = _cropped(_pixels(_best(_apart(_channels_last(shuffle), shuffle, inside).output(0), 3, label_type), shuffle), crops)
    return _with_output(model, opset.squeeze(labels, opset.constant(np.int64(1))))


def ending_in_scores(model: Any) -> Any:
    """The model with the same output, with one pass less where channels become pixels at the end.

    The engine keeps maps channels last and reorders them before a pixel shuffle: two passes over the largest tensor. One permutation from
    channels last is one pass. The scores are the same, bit for bit.
    """
    shuffle, crops = _end(model)
    if shuffle is None:
        return model
    return _with_output(model, _cropped(_pixels(_channels_last(shuffle), shuffle), crops))


def _channels_last(shuffle: Any) -> Any:
    """Input of a pixel shuffle, (B, h, w, K * block * block)."""
    return openvino.opset13.transpose(shuffle.input_value(0), openvino.opset13.constant([0, 2, 3, 1]))


def _apart(map_Bhw: Any, shuffle: Any, *inside: int) -> Any:
    """A map of a pixel shuffle's rows and columns, with the values at each position reshaped to (..., *inside)."""
    opset = openvino.opset13
    rows, columns = _sides(shuffle.input_value(0))
    return opset.reshape(map_Bhw, opset.concat([opset.constant([0]), rows, columns, opset.constant([-1, *inside])], 0), special_zero=True)


def _pixels(map_Bhw: Any, shuffle: Any) -> Any:
    """A map (B, h, w, ...) of K * block * block values each as (B, K, block * h, block * w), by one permutation."""
    opset = openvino.opset13
    block = shuffle.get_attributes()["block_size"]
    spread = opset.transpose(_apart(map_Bhw, shuffle, block, block), opset.constant([0, 3, 1, 4, 2, 5]))
    spread.set_friendly_name(shuffle.get_friendly_name())
    sides = [opset.multiply(side, opset.constant([block])) for side in _sides(shuffle.input_value(0))]
    return opset.reshape(spread, opset.concat([opset.constant([0, 0]), *sides], 0), special_zero=True)


def _end(model: Any) -> tuple[Any | None, list[Any]]:
    """The pixel shuffle at a model's end, None without one, and the crops after it, the last one first."""
    node, crops = _last(model).get_node(), []
    while _crops_only(node):
        crops.append(node)
        node = node.input_value(0).get_node()
    shuffles = node.get_type_name() == "DepthToSpace" and node.get_attributes()["mode"] == "depth_first"
    return (node if shuffles else None), crops


def _last(model: Any) -> Any:
    return model.outputs[0].get_node().input_value(0)


def _sides(channels: Any) -> tuple[Any, Any]:
    """Rows and columns of a map (B, C, h, w), as vectors of one number."""
    opset = openvino.opset13
    shape = opset.shape_of(channels)
    rows, columns = (opset.gather(shape, opset.constant([axis]), opset.constant(np.int64(0))) for axis in (2, 3))
    return rows, columns


def _cropped(node: Any, crops: list[Any]) -> Any:
    for crop in reversed(crops):
        node = openvino.opset13.slice(node, *(crop.input_value(number) for number in range(1, 5)))
    return node


def _with_output(model: Any, node: Any) -> Any:
    return openvino.Model([node], model.get_parameters(), model.get_friendly_name())


def _best(scores: Any, axis: int, label_type: np.dtype[Any]) -> Any:
    """The index along an axis; of equal scores the first."""
    opset = openvino.opset13
    best = opset.topk(scores, opset.constant(np.int64(1)), axis, "max", "value", "i32", stable=True)
    return opset.convert(best.output(1), label_type)


def _crops_only(node: Any) -> bool:
    """Returns True for a node that only crops rows and columns."""
    if node.get_type_name() != "Slice" or node.get_input_size() != 5:
        return False
    axes = node.input_value(4).get_node()
    return axes.get_type_name() == "Constant" and set(axes.get_data().ravel().tolist()) <= {2, 3, -1, -2}
