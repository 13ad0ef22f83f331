"""Integers at their real bit width: n values of b bits take ceil(n * b / 8) bytes.

Value i occupies bits i*b ... (i+1)*b - 1 of the stream, least significant bit first, bytes in order; signed values are two's complement.
Unused bits of the last byte are zero. numpy's packbits works on blocks of a fixed size, since unpacked bits take eight bytes a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from muntin.errors import ArtifactError

BITS = range(2, 9)
_BLOCK = 1 << 18  # a multiple of 8 values, so that every block but the last ends on a whole byte


def pack(values: NDArray[np.integer], bits: int, signed: bool) -> NDArray[np.uint8]:
    """Packs integers of any shape, in C order, into a flat byte array. Raises ArtifactError for bits or values out of range."""
    low, high = value_range(bits, signed)
    if values.dtype.kind not in "iu":
        raise ArtifactError(f"values of type {values.dtype} cannot be packed: give integers")
    flat = values.reshape(-1)
    if flat.size and (int(flat.min()) < low or int(flat.max()) > high):
        raise ArtifactError(
            f"values {flat.min()} to {flat.max()} do not fit {bits} bits ({low} to {high}): give more bits, or quantise on that grid"
        )
    packed = np.empty(packed_size(flat.size, bits), np.uint8)
    for start, stop, byte_start, byte_stop in _blocks(flat.size, bits):
        bytes_N1 = flat[start:stop].astype(np.uint8)[:, None]  # the cast keeps the low 8 bits of a two's complement
        bits_Nb = np.unpackbits(bytes_N1, axis=1, bitorder="little")[:, :bits]
        packed[byte_start:byte_stop] = np.packbits(bits_Nb.reshape(-1), bitorder="little")
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...], signed: bool) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Inverse of `pack`: int8 (signed) or uint8 values of `shape`. Raises ArtifactError for a wrong number of bytes."""
    value_range(bits, signed)
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (packed_size(size, bits),):
        raise ArtifactError(
            f"{packed.shape} {packed.dtype} packed bytes for {size} values of {bits} bits: ({packed_size(size, bits)},) uint8 are needed"
        )
    values = np.empty(size, np.uint8)
    sign = np.uint8(1 << (bits - 1))
    for start, stop, byte_start, byte_stop in _blocks(size, bits):
        count = stop - start
        bits_Nb = np.unpackbits(packed[byte_start:byte_stop], bitorder="little", count=count * bits).reshape(count, bits)
        block = np.packbits(bits_Nb, axis=1, bitorder="little")[:, 0]
        # (v xor s) - s extends the sign bit s to 8 bits; the wrap-around at 8 bits is intended
        values[start:stop] = (block ^ sign) - sign if signed else block
    shaped = values.reshape(shape)
    return shaped.view(np.int8) if signed else shaped


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` values of `bits` bits."""
    return (count * bits + 7) // 8


def value_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest value. Raises ArtifactError for a width that cannot be packed."""
    if bits not in BITS:
        raise ArtifactError(f"{bits} bits a value cannot be packed: give {BITS.start} to {BITS.stop - 1}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _blocks(count: int, bits: int) -> Iterator[tuple[int, int, int, int]]:
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        yield start, stop, start * bits // 8, packed_size(stop, bits)
