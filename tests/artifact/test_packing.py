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


@pytest.mark.parametrize(
    ("values", "bits", "signed"), [([8], 4, True), ([-9], 4, True), ([-1], 4, False), ([16], 4, False), ([300], 8, False)]
)
def test_values_out_of_range(values: list[int], bits: int, signed: bool) -> None:
    with pytest.raises(ArtifactError, match=f"do not fit {bits} bits"):
        pack(np.array(values), bits, signed)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_widths_out_of_range(bits: int) -> None:
    with pytest.raises(ArtifactError, match="2 to 8"):
        pack(np.zeros(3, np.int8), bits, signed=True)


def test_floats_are_refused() -> None:
    with pytest.raises(ArtifactError, match="float64"):
        pack(np.zeros(3), 4, signed=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_wrong_number_of_bytes(length: int) -> None:
    assert packed_size(3, 4) == 2
    with pytest.raises(ArtifactError, match=r"\(2,\) uint8 are needed"):
        unpack(np.zeros(length, np.uint8), 4, (3,), signed=True)
