"""Bit packing: nothing is lost, nothing is wasted, nothing out of range passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muntin.artifact import pack, unpack
from muntin.artifact.packing import packed_size, value_range
from muntin.errors import ArtifactError


@given(data=st.data(), bits=st.integers(2, 8), signed=st.booleans())
def test_round_trip_of_any_shape(data: st.DataObject, bits: int, signed: bool) -> None:
    low, high = value_range(bits, signed)
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    values = data.draw(hnp.arrays(np.int16, shape, elements=st.integers(low, high)))
    packed = pack(values, bits, signed)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-values.size * bits // 8),)
    restored = unpack(packed, bits, shape, signed)
    assert restored.dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(restored, values)


@pytest.mark.parametrize("bits", [3, 5, 7])
def test_round_trip_across_blocks(bits: int) -> None:
    low, high = value_range(bits, signed=True)
    values = np.random.default_rng(0).integers(low, high + 1, 2**18 * 2 + 13).astype(np.int8)
    np.testing.assert_array_equal(unpack(pack(values, bits, signed=True), bits, values.shape, signed=True), values)


def test_documented_layout() -> None:
    # 3-bit two's complement, least significant bit first: 1 = 100, -1 = 111, -4 = 001 -> stream 100111001 -> bytes 0b00111001, 0b1
    np.testing.assert_array_equal(pack(np.array([1, -1, -4]), 3, signed=True), [0b00111001, 0b1])


@pytest.mark.parametrize("length", [0, 1, 3])
def test_wrong_number_of_bytes(length: int) -> None:
    assert packed_size(3, 4) == 2
    with pytest.raises(ArtifactError, match=r"\(2,\) uint8 are needed"):
        unpack(np.zeros(length, np.uint8), 4, (3,), signed=True)


@pytest.mark.parametrize(
    ("values", "bits", "signed", "message"),
    [
        ([8], 4, True, "do not fit 4 bits"),
        ([-9], 4, True, "do not fit 4 bits"),
        ([-1], 4, False, "do not fit 4 bits"),
        ([300], 8, False, "do not fit 8 bits"),
        *(([0], bits, True, "2 to 8") for bits in (0, 1, 9)),
        ([0.0], 4, True, "float64"),
    ],
)
def test_values_that_cannot_be_packed(values: list[int], bits: int, signed: bool, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        pack(np.array(values), bits, signed)
