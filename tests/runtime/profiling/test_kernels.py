"""Work in multiply-adds and bytes, the ceilings it is held against, and kinds in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from muntin.artifact import LayerRecord
from muntin.runtime.profiling.kernels import (
    CONVERT,
    COPIES,
    ELEMENTWISE,
    LAYOUT,
    OTHER,
    PRODUCTS,
    Ceilings,
    Kernel,
    Operand,
    convolution_macs,
    deconvolution_macs,
    group_of,
    layer_of,
    product_macs,
)

CEILINGS = Ceilings(gmacs={"f32": 100.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


def operand(shape: tuple[int, ...], type: str = "f32", layout: str = "abcd") -> Operand:
    return Operand(shape=shape, type=type, bytes=int(np.prod(shape)) * {"f32": 4, "u8": 1, "i8": 1}[type], layout=layout)


def kernel(**changes: Any) -> Kernel:
    values: dict[str, Any] = {
        "name": "node", "kind": "Convolution", "implementation": "jit", "precision": "f32", "compute": True, "layer": None, "ms": 2.0,
        "macs": 100_000_000, "inputs": (operand((1, 8, 10, 10)),), "outputs": (operand((1, 8, 10, 10)),), "group": PRODUCTS,
    }  # fmt: skip
    return Kernel(**(values | changes))


def test_convolution_macs() -> None:
    assert convolution_macs((2, 6, 5, 7), (6, 3, 3, 3)) == 2 * 6 * 5 * 7 * 3 * 3 * 3
    assert convolution_macs((2, 6, 5, 7), (3, 2, 4, 3, 3)) == 2 * 6 * 5 * 7 * 4 * 3 * 3  # 3 groups of 2 outputs and 4 inputs
    assert convolution_macs((1, 8, 5, 5), (8, 1, 1, 3, 3)) == 8 * 25 * 9  # depthwise


def test_deconvolution_macs() -> None:
    assert deconvolution_macs((2, 3, 5, 7), (3, 6, 2, 2)) == 2 * 3 * 5 * 7 * 6 * 2 * 2


@pytest.mark.parametrize(
    ("left", "right", "output", "inner"),
    [
        ((4, 5, 7), (4, 7, 3), (4, 5, 3), 7),
        ((4, 7, 5), (4, 7, 3), (4, 5, 3), 7),  # transposed
        ((5, 5), (5, 3), (5, 3), 5),
        ((7,), (7, 3), (3,), 7),
        ((1, 7), (7, 3), (1, 3), 7),
        ((2, 3, 1, 7), (2, 3, 7, 1), (2, 3, 1, 1), 7),
        ((2, 5, 7), (7,), (2, 5), 7),
        ((5, 7), (7,), (5,), 7),
        ((7,), (7,), (), 7),
    ],
)
def test_product_macs(left: tuple[int, ...], right: tuple[int, ...], output: tuple[int, ...], inner: int) -> None:
    assert product_macs(left, right, output) == int(np.prod(output)) * inner


def test_attainable_time() -> None:
    assert kernel().attainable_ms(CEILINGS) == pytest.approx(1.0)  # 1e8 at 1e11 a second
    assert kernel(precision="i8").attainable_ms(CEILINGS) == pytest.approx(0.25)
    wide = kernel(macs=0, inputs=(operand((1, 8, 1000, 1000)),))  # 32 MB at 10 GB/s
    assert wide.attainable_ms(CEILINGS) == pytest.approx(3.2, rel=1e-3)
    assert wide.bounds_ms(CEILINGS)[0] == 0.0


def test_attainable_time_without_ceiling() -> None:
    assert kernel(precision="bf16").attainable_ms(CEILINGS) is None
    assert kernel(precision="bf16", macs=0).attainable_ms(CEILINGS) is not None


def test_bytes_of_kernels() -> None:
    inputs = (operand((1, 8, 10, 10), "u8"), operand((8, 8, 3, 3), "i8"))
    assert kernel(inputs=inputs, outputs=(operand((1, 8, 10, 10)),)).bytes == 800 + 576 + 3200


def test_layer_of_a_node() -> None:
    records = [LayerRecord(name=name, kind="Conv2d", weight_bits=8) for name in ("a.conv", "a.convolution", "b")]
    assert layer_of("a.conv", "", records) == "a.conv"
    assert layer_of("b/left", "", records) == "b"
    assert layer_of("a.norm", "model.a.conv.weight", records) == "a.conv"
    assert layer_of("a.norm", "model.c.a.conv.weight", records) is None
    assert layer_of("a.con", "", records) is None
    assert layer_of(None, "model.a.conv.weight", records) is None


def test_kinds_in_words() -> None:
    float_, bytes_, last = (operand((1, 8, 4, 4)),), (operand((1, 8, 4, 4), "u8"),), (operand((1, 8, 4, 4), layout="acdb"),)
    assert group_of("Subgraph", 5, ["MatMul", "Softmax"], float_, float_) == PRODUCTS
    assert group_of("Subgraph", 0, ["QuantizeLinear"], float_, bytes_) == CONVERT
    assert group_of("Subgraph", 0, ["Add", "QuantizeLinear"], float_, bytes_) == ELEMENTWISE
    assert group_of("Subgraph", 0, [], float_, bytes_) == ELEMENTWISE
    assert group_of("Reorder", 0, [], float_, last) == LAYOUT
    assert group_of("Reorder", 0, [], float_, bytes_) == CONVERT  # the same order, another type
    assert group_of("Transpose", 0, [], float_, bytes_[:0]) == LAYOUT
    assert group_of("Split", 0, [], float_, float_) == COPIES
    assert group_of("Transpose", 0, ["DepthToSpace"], float_, float_) == COPIES  # channels become pixels
    assert group_of("Unheard", 0, [], float_, float_) == OTHER


def test_words_and_label() -> None:
    assert kernel(precision="i8").words == "convolution and matrix products, INT8"
    assert kernel(group=LAYOUT, macs=0).words == LAYOUT
    assert kernel(layer="stem.conv").label == "stem.conv"
    assert kernel().label == "node"
