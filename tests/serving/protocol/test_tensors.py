"""Bytes and numbers to arrays and back: views where they can be, and nothing that was not announced."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muntin.serving.protocol.messages import Limits, ProtocolError
from muntin.serving.protocol.tensors import DATATYPES, check_datatype, datatype_of, from_binary, from_values, strings_array, to_binary

LIMITS = Limits()
NUMBERS = [name for name in DATATYPES if name != "BYTES"]


def read(raw: bytes, datatype: str, *shape: int, limits: Limits = LIMITS) -> Any:
    return from_binary(raw, datatype, shape, int(np.prod(shape)), "x", limits)


def take(values: list[Any], datatype: str, *shape: int, limits: Limits = LIMITS) -> Any:
    return from_values(values, datatype, shape, int(np.prod(shape)), "x", limits)


@given(st.data(), st.sampled_from(NUMBERS))
def test_binary_round_trip(data: Any, datatype: str) -> None:
    array = data.draw(hnp.arrays(DATATYPES[datatype], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
    assert datatype_of(array, "x") == datatype
    raw = bytes(to_binary(array, datatype))
    assert raw == array.tobytes()
    back = read(raw, datatype, *array.shape)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == raw


@given(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), st.data())
def test_bytes_round_trip(shape: tuple[int, ...], data: Any) -> None:
    count = int(np.prod(shape))
    array = np.empty(count, object)
    array[:] = data.draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
    array = array.reshape(shape)
    back = read(bytes(to_binary(array, "BYTES")), "BYTES", *shape)
    assert back.shape == shape
    assert back.reshape(-1).tolist() == array.reshape(-1).tolist()


@given(st.data(), st.sampled_from(NUMBERS))
def test_numbers_round_trip(data: Any, datatype: str) -> None:
    dtype = DATATYPES[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=3, min_side=0, max_side=5), elements=hnp.from_dtype(dtype, **elements)))
    back = take(array.reshape(-1).tolist(), datatype, *array.shape)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_copy_of_a_misaligned_tensor() -> None:
    body = bytearray(64)
    for offset in range(8):
        array = read(memoryview(body)[offset : offset + 16], "FP64", 2)
        assert array.flags.aligned
        assert np.shares_memory(array, np.frombuffer(body, np.uint8)) == (np.frombuffer(body, "u1")[offset:].ctypes.data % 8 == 0)


def test_output_without_a_copy() -> None:
    scores = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = to_binary(scores, "FP32")
    assert isinstance(raw, memoryview)
    assert np.shares_memory(np.frombuffer(raw, np.uint8), scores)


@pytest.mark.parametrize("array", [np.arange(12, dtype=">f4").reshape(3, 4), np.arange(24, dtype="<f4").reshape(4, 6)[::2, ::-1].T])
def test_outputs_in_other_layouts(array: Any) -> None:
    np.testing.assert_array_equal(read(bytes(to_binary(array, "FP32")), "FP32", *array.shape), array)


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "message"),
    [
        (bytes(5), "UINT8", (4,), r"came with 5 bytes: UINT8 of shape \[4\] takes 4"),
        (bytes(15), "FP32", (2, 2), "came with 15 bytes.*takes 16"),
        (b"", "INT64", (1,), "came with 0 bytes.*takes 8"),
        (bytes(1), "FP16", (0, 3), "came with 1 bytes.*takes 0"),
        (b"\0\1\2", "BOOL", (3,), "neither 0 nor 1"),
        (b"", "BYTES", (1,), "take 4 each"),
        (bytes(7), "BYTES", (2,), "take 4 each"),
        (struct.pack("<I", 5) + b"four", "BYTES", (1,), "are not 1 elements of BYTES"),
        (struct.pack("<I", 3) + b"four", "BYTES", (1,), "are not 1 elements"),
        (struct.pack("<I", 2**32 - 1) + b"four", "BYTES", (1,), "are not 1 elements"),
        (struct.pack("<I", 4) + b"fourabc", "BYTES", (2,), "are not 2 elements"),
        (b"rest", "BYTES", (0,), "are not 0 elements"),
        (bytes(4 * 70_000), "BYTES", (70_000,), "70,000 elements of BYTES: this server takes at most 65,536"),
    ],
)
def test_wrong_binary_tensors(raw: bytes, datatype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read(raw, datatype, *shape)


@pytest.mark.parametrize(
    ("values", "datatype", "message"),
    [
        ([1, 2, 3], "UINT8", r"3 values: shape \[2\] takes 2"),
        ([1, 256], "UINT8", "value 256: UINT8 holds 0 to 255"),
        ([-1, 0], "UINT16", "value -1: UINT16"),
        ([0, -129], "INT8", "value -129: INT8 holds -128 to 127"),
        ([0, 2**63], "INT64", "INT64 holds"),
        ([1, 1.0], "INT32", r"has 1.0 \(a fraction, or beyond 64 bits\).*INT32 takes whole numbers"),
        ([True, 1], "INT32", "has true in its data"),
        ([1, 0], "BOOL", "has 1 in its data: BOOL takes true or false"),
        ([True, 1.0], "FP32", "has true in its data: FP32 takes numbers"),
        ([None, 1.0], "FP64", "has nothing in its data"),
        (["1", 1.0], "FP32", "has '1' in its data"),
        ([[1.0], [2.0]], "FP32", "has an array in its data"),
        ([1e39, 0], "FP32", "beyond FP32's largest"),
        ([65520, 0], "FP16", "beyond FP16's largest, 65504"),
        (["a", 1], "BYTES", "has 1 in its data: BYTES takes strings"),
        (["a"], "BYTES", "1 values"),
    ],
)
def test_wrong_values(values: list[Any], datatype: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        take(values, datatype, 2)


def test_limits_of_integer_types() -> None:
    for datatype in NUMBERS:
        dtype = DATATYPES[datatype]
        if dtype.kind in "ui":
            ends = [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
            assert take(ends, datatype, 2).tolist() == ends


def test_too_many_strings() -> None:
    few = Limits(byte_strings=2)
    for make in (lambda: take(["a"] * 3, "BYTES", 3, limits=few), lambda: strings_array([b"a"] * 3, (3,), 3, "x", few)):
        with pytest.raises(ProtocolError, match="3 elements of BYTES") as caught:
            make()
        assert caught.value.status == 413
    assert strings_array([b"a", b"b"], (2, 1), 2, "x", few).tolist() == [[b"a"], [b"b"]]
    with pytest.raises(ProtocolError, match="1 values"):
        strings_array([b"a"], (2,), 2, "x", few)


@pytest.mark.parametrize("datatype", ["BF16", "uint8", "", "STRING", None, 1, ["UINT8"]])
def test_unknown_datatypes(datatype: Any) -> None:
    with pytest.raises(ProtocolError, match=r"BOOL, UINT8.*BYTES"):
        check_datatype(datatype, "x")


def test_output_of_an_unknown_type() -> None:
    with pytest.raises(ProtocolError, match="'x' is of type complex64") as caught:
        datatype_of(np.zeros(1, np.complex64), "x")
    assert caught.value.status == 500


def test_datatypes_without_objects() -> None:
    """What `frombuffer` and `tobytes` see are numbers: an object there would be an address."""
    assert [name for name, dtype in DATATYPES.items() if dtype.hasobject] == ["BYTES"]
