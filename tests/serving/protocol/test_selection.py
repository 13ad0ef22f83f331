"""The requested outputs, and an output as its best classes."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muntin.serving.protocol.messages import InferOutput, InferResponse, ProtocolError, RequestedOutput
from muntin.serving.protocol.selection import best_classes, select


def output(values: Any, *labels: str) -> InferOutput:
    return InferOutput(name="scores", data=np.asarray(values), labels=labels)


RESPONSE = InferResponse(
    model="m",
    version="1",
    id="",
    outputs=(output(np.float32([[1, 3, 2]])), InferOutput(name="labels", data=np.uint8([[1]]))),
)


def test_all_outputs() -> None:
    for binary in (True, False):
        selected = select(RESPONSE, (), binary_default=binary)
        assert [(item.name, item.binary) for item in selected] == [("scores", binary), ("labels", binary)]


def test_requested_outputs() -> None:
    requested = (RequestedOutput(name="labels", binary=True), RequestedOutput(name="scores", classification=1))
    labels, scores = select(RESPONSE, requested, binary_default=True)
    assert (labels.name, labels.binary) == ("labels", True)
    assert labels.data is RESPONSE.outputs[1].data
    assert (scores.name, scores.binary, scores.data.tolist()) == ("scores", False, [[b"3.0:1"]])


def test_unknown_output() -> None:
    with pytest.raises(ProtocolError, match="output 'mask': model m gives scores, labels"):
        select(RESPONSE, (RequestedOutput(name="mask"),), binary_default=True)


def test_example_of_the_extension() -> None:
    scores = np.float32([1.1, 3.3, 0.5, 2.4])
    assert best_classes(output(scores), 2).tolist() == [b"3.3:1", b"2.4:3"]
    labels = [f"index_{index}_label" for index in range(4)]
    assert best_classes(output(scores, *labels), 2).tolist() == [b"3.3:1:index_1_label", b"2.4:3:index_3_label"]


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        (np.float32([[1, 2], [4, 3]]), 1, [[b"2.0:1"], [b"4.0:0"]]),
        (np.uint8([0, 255, 255, 3]), 3, [b"255:1", b"255:2", b"3:3"]),
        (np.int64([-5, -7]), 9, [b"-5:0", b"-7:1"]),
        (np.float32([np.nan, 1, -np.inf]), 3, [b"1.0:1", b"nan:0", b"-inf:2"]),
        (np.float32([[[1, 2], [3, 4]]]), 2, [[b"4.0:3", b"3.0:2"]]),
        (np.float32(7), 2, [b"7.0:0"]),
        (np.zeros(0, np.float32), 2, []),
        (np.zeros((2, 0), np.float32), 2, [[], []]),
        (np.zeros((0, 3), np.float32), 2, []),
    ],
)
def test_best_classes(values: Any, count: int, expected: list[Any]) -> None:
    assert best_classes(output(values), count).tolist() == expected


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4"])
def test_digits_of_values(kind: str) -> None:
    values = np.array([3.3, 1e-5, -2.5e-3, 16777216 if kind != "f2" else 2048, 0.1 + 0.2], kind)
    for text in best_classes(output(values), 9):
        digits, index = text.decode().split(":")
        assert Decimal(digits) == Decimal(str(values[int(index)]))  # numpy's are the fewest


def test_fewer_labels_than_classes() -> None:
    assert best_classes(output(np.uint8([1, 2]), "first"), 2).tolist() == [b"2:1", b"1:0:first"]


@given(hnp.arrays(st.sampled_from([np.float32, np.int16, np.uint8]), st.integers(1, 30), elements=st.integers(0, 9)), st.integers(1, 40))
def test_order_of_classes(values: Any, count: int) -> None:
    plain = sorted(range(len(values)), key=lambda index: (-int(values[index]), index))[:count]
    assert [int(text.split(b":")[1]) for text in best_classes(output(values), count)] == plain


@pytest.mark.parametrize("values", [np.array([True]), np.array([b"a"], object)])
def test_classes_of_no_numbers(values: Any) -> None:
    with pytest.raises(ProtocolError, match="of numbers only"):
        best_classes(output(values), 1)
