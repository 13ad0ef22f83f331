"""Sparse weights: the places of the values that are stored, and these values at their bit width.

    "N:M"         at most N of M neighbours along an axis are not zero: the rank of each group's places among the C(M, N) combinations,
                  and N values of each group. 2:4 takes 2.67 bits a group (3 ranks in a byte), 4:8 6.22 bits (9 ranks in 7 bytes)
    "block:RxC"   blocks of R rows and C columns along the first two axes, all zero or stored whole: a bit for each block; 1x1 is a bitmask

The places come first, then the values, packed as dense ones are (`packing`). Zeros lose their sign.

Axes: G groups or blocks, M members of one, N stored members.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from muntin.artifact.manifest import SparseStorage
from muntin.artifact.packing import packed_size
from muntin.errors import ArtifactError

GROUPS = (2, 4, 8, 16)
"""Lengths of groups in which patterns are looked for."""
BLOCKS = (1, 2, 4, 8, 16, 32)
"""Sides of blocks in which patterns are looked for."""
SMALLEST_BLOCK = 8
"""Weights of a block from which on a pattern counts: smaller ones are zero by chance in weights of few bits."""
LEAST_SAVED = 128
"""Bytes that a sparse form must save: its record in the manifest takes about as many."""
LARGEST_RATIO = 128
"""Most times that a sparse form is smaller than the dense one: a reader allocates the dense one."""


def smallest_form(values: NDArray[Any], bits: int) -> SparseStorage | None:
    """The sparse form in which values of `bits` bits take the fewest bytes; None if the dense form takes as few, or one axis is left.

    Costs a few passes over the values, more for those with a tenth of zeros.
    """
    zeros = values.size - int(np.count_nonzero(values))
    if values.ndim < 2 or zeros * 10 < values.size:
        return None
    forms = [SparseStorage(pattern=f"{n}:{m}", axis=axis, values=values.size // m * n) for axis, n, m in _groups(values)]
    forms += [SparseStorage(pattern=f"block:{r}x{c}", axis=0, values=stored) for r, c, stored in _blocks(values)]
    dense = packed_size(values.size, bits)
    sizes = {form: stored_size(form, values.shape, bits) for form in forms}
    possible = [form for form, size in sizes.items() if size + LEAST_SAVED <= dense <= LARGEST_RATIO * size]
    return min(possible, key=lambda form: sizes[form], default=None)


def pattern_along(values: NDArray[Any], axis: int) -> str:
    """The pattern of the zeros along the axis of a weight's inputs, 0 or 1; empty if there is none.

    Of N:M with N of at most M/2 the one with the smallest share; else blocks, outputs x inputs, the largest with the most zeros.
    """
    if not values.any():
        return ""
    shares = [(n / m, m, f"{n}:{m}") for at, n, m in _groups(values) if at == axis and 2 * n <= m]
    if shares:
        return min(shares)[2]
    sides = [(stored, -r * c, (r, c) if axis else (c, r)) for r, c, stored in _blocks(values) if r * c >= SMALLEST_BLOCK]
    stored, _, (outputs, inputs) = min(sides, default=(values.size, 0, (1, 1)))
    return f"block:{outputs}x{inputs}" if stored < 0.9 * values.size else ""


def stored_size(form: SparseStorage, shape: tuple[int, ...], bits: int) -> int:
    """Bytes of places and values."""
    return _index_size(form, shape) + packed_size(form.values, bits)


def take_values(values: NDArray[Any], form: SparseStorage) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """The bytes of the places, and the values that are stored, flat, in the order of groups or blocks. The pattern must hold."""
    groups_GM = _grouped(values, form)
    if (counts := _counts(form)) is None:
        stored_G = groups_GM.any(1)
        return np.packbits(stored_G, bitorder="little"), groups_GM[stored_G].reshape(-1)
    n, m = counts
    ranks, places = _combinations(n, m)
    masks_G = np.zeros(len(groups_GM), np.int64)
    for place in range(m):
        masks_G |= (groups_GM[:, place] != 0).astype(np.int64) << place
    ranks_G = ranks[masks_G]
    return _pack_ranks(ranks_G, math.comb(m, n)), np.take_along_axis(groups_GM, places[ranks_G], 1).reshape(-1)


def put_values(index: NDArray[np.uint8], stored: NDArray[Any], form: SparseStorage, shape: tuple[int, ...]) -> NDArray[Any]:
    """Inverse of `take_values`: the values in their shape, zeros elsewhere. Raises ArtifactError for places that do not fit them."""
    check_form(form, shape)
    size = math.prod(shape)
    if index.shape != (_index_size(form, shape),) or stored.shape != (form.values,):
        raise ArtifactError(f"{index.size} bytes of places and {stored.size} values for the pattern {form.pattern} of {shape}")
    if (counts := _counts(form)) is None:
        r, c = _block(form)
        count = size // (r * c)
        stored_G = np.unpackbits(index, bitorder="little")
        if stored_G[count:].any() or int(stored_G.sum()) * r * c != form.values:
            raise ArtifactError(f"{int(stored_G.sum())} blocks of {form.pattern} are marked for {form.values} values")
        groups_GM = np.zeros((count, r * c), stored.dtype)
        groups_GM[stored_G[:count].astype(bool)] = stored.reshape(-1, r * c)
    else:
        n, m = counts
        _, places = _combinations(n, m)
        groups_GM = np.zeros((size // m, m), stored.dtype)
        np.put_along_axis(groups_GM, places[_unpack_ranks(index, len(places), size // m)], stored.reshape(-1, n), 1)
    return _ungrouped(groups_GM, form, shape)


def check_form(form: SparseStorage, shape: tuple[int, ...]) -> None:
    """Raise ArtifactError for a form that a weight of `shape` cannot have."""
    counts = _counts(form)
    if counts is None:
        fits = len(shape) >= 2 and not any(side % step for side, step in zip(shape[:2], _block(form), strict=True))
        possible = form.values <= math.prod(shape)
    else:
        n, m = counts
        fits = n < m <= GROUPS[-1] and form.axis < len(shape) and shape[form.axis] % m == 0
        possible = fits and form.values == math.prod(shape) // m * n
    if not fits or not possible:
        raise ArtifactError(f"a weight of {shape} cannot have the pattern {form.pattern} along axis {form.axis} with {form.values} values")


def index_bytes(form: SparseStorage, shape: tuple[int, ...]) -> int:
    """Bytes of the places. Raises ArtifactError for a form that a weight of `shape` cannot have."""
    check_form(form, shape)
    return _index_size(form, shape)


def _groups(values: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Axis, N and M of the patterns that hold along the first two axes, with N < M."""
    found = []
    for axis in range(min(2, values.ndim)):
        counts = (values != 0).astype(np.uint8)  # of groups of 1, then 2, 4, ...
        for m in GROUPS:
            if counts.shape[axis] % 2 or not counts.size:
                break
            even, odd = ((slice(None),) * axis + (slice(start, None, 2),) for start in (0, 1))
            counts = counts[even] + counts[odd]
            if 0 < (n := int(counts.max())) < m:
                found.append((axis, n, m))
    return found


def _blocks(values: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Rows and columns of blocks that divide the first two axes, and the values in blocks that are not all zero."""
    if values.ndim < 2:
        return []
    filled = {(1, 1): (values != 0).reshape(*values.shape[:2], -1)}  # by rows and columns: which blocks are not all zero
    for before, side in itertools.pairwise(BLOCKS):
        if values.shape[0] % side == 0:
            filled[side, 1] = _any(filled[before, 1], 0, side // before)
    for rows in [rows for rows, _ in filled]:
        for before, side in itertools.pairwise(BLOCKS):
            if values.shape[1] % side == 0:
                filled[rows, side] = _any(filled[rows, before], 1, side // before)
    return [(rows, columns, int(np.count_nonzero(blocks)) * rows * columns) for (rows, columns), blocks in filled.items()]


def _any(filled: NDArray[np.bool_], axis: int, count: int) -> NDArray[np.bool_]:
    """True where any of `count` neighbours along an axis is."""
    parts = [filled[(slice(None),) * axis + (slice(start, None, count),)] for start in range(count)]
    return functools.reduce(np.logical_or, parts)


def _counts(form: SparseStorage) -> tuple[int, int] | None:
    """N and M; None for blocks."""
    if form.pattern.startswith("block:"):
        return None
    n, m = form.pattern.split(":")
    return int(n), int(m)


def _block(form: SparseStorage) -> tuple[int, int]:
    rows, columns = form.pattern.removeprefix("block:").split("x")
    return int(rows), int(columns)


def _grouped(values: NDArray[Any], form: SparseStorage) -> NDArray[Any]:
    if (counts := _counts(form)) is not None:
        return np.moveaxis(values, form.axis, -1).reshape(-1, counts[1])
    r, c = _block(form)
    rows, columns, *rest = values.shape
    split = values.reshape(rows // r, r, columns // c, c, -1)  # the taps of a kernel are the last
    return split.transpose(0, 2, 4, 1, 3).reshape(rows // r * (columns // c) * math.prod(rest), r * c)


def _ungrouped(groups_GM: NDArray[Any], form: SparseStorage, shape: tuple[int, ...]) -> NDArray[Any]:
    if _counts(form) is not None:
        moved = (*shape[: form.axis], *shape[form.axis + 1 :], shape[form.axis])
        return np.ascontiguousarray(np.moveaxis(groups_GM.reshape(moved), -1, form.axis))
    r, c = _block(form)
    rows, columns, *rest = shape
    split = groups_GM.reshape(rows // r, columns // c, math.prod(rest), r, c)
    return np.ascontiguousarray(split.transpose(0, 3, 1, 4, 2)).reshape(shape)


@functools.cache
def _combinations(n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rank of each mask of m bits with at most n ones, to which the first zeros are added, and the places of each rank, (C, n).

    Ranks are in the order of itertools.combinations.
    """
    places = np.array(list(itertools.combinations(range(m), n)), np.int64)
    of_masks = np.zeros(1 << m, np.int64)
    of_masks[(1 << places).sum(1)] = np.arange(len(places))
    empty = np.arange(1 << m)[:, None] >> np.arange(m) & 1 == 0
    filled = np.argsort(empty, axis=1, kind="stable")[:, :n]
    return of_masks[(1 << filled).sum(1)], places


@functools.cache
def _word(base: int) -> tuple[int, int]:
    """Digits of a base in a word, and the word's bytes, 1 to 7, with the most digits a byte."""
    sizes = {width: max(k for k in range(1, 57) if base**k <= 256**width) for width in range(1, 8) if base <= 256**width}
    width = max(sizes, key=lambda size: sizes[size] / size)
    return sizes[width], width


def _index_size(form: SparseStorage, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if (counts := _counts(form)) is None:
        r, c = _block(form)
        return (size // (r * c) + 7) // 8
    n, m = counts
    digits, width = _word(math.comb(m, n))
    return -(-(size // m) // digits) * width


def _pack_ranks(ranks_G: NDArray[np.int64], base: int) -> NDArray[np.uint8]:
    digits, width = _word(base)
    padded = np.zeros(-(-len(ranks_G) // digits) * digits, np.uint64)
    padded[: len(ranks_G)] = ranks_G
    powers = np.array([base**k for k in range(digits)], np.uint64)
    words = (padded.reshape(-1, digits) * powers).sum(1, dtype=np.uint64)
    packed: NDArray[np.uint8] = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
    return packed


def _unpack_ranks(index: NDArray[np.uint8], base: int, count: int) -> NDArray[np.int64]:
    digits, width = _word(base)
    wide = np.zeros((len(index) // width, 8), np.uint8)
    wide[:, :width] = index.reshape(-1, width)
    left = wide.reshape(-1).view("<u8").astype(np.uint64)
    ranks = np.empty((len(left), digits), np.int64)
    for k in range(digits):
        left, ranks[:, k] = np.divmod(left, np.uint64(base))
    flat = ranks.reshape(-1)
    if left.any() or flat[count:].any():
        raise ArtifactError(f"places of a group beyond its {base} combinations")
    return flat[:count]


LEAST_VALUES = 256
"""Values of a weight from which on a pattern counts: fewer may have one by chance, as weights of few bits have many zeros."""


def sparsity_of(model: onnx.ModelProto) -> dict[str, str]:
    """The pattern along the inputs of each Conv, MatMul and Gemm whose constant weight has one, by the node's name: "2:4", "block:4x4".

    Weights may be quantised (DequantizeLinear). The inputs of a Conv are axis 1 of its weight, those of a product the axis that is summed.
    Grouped convolutions are left out. Costs a few passes over the weights.
    """
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("DequantizeLinear", "Identity")}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        name = node.input[1]
        while name in sources and name not in constants:
            name = sources[name]
        options = {attribute.name: attribute.i for attribute in node.attribute}
        weight = constants.get(name)
        if weight is None or len(weight.dims) < 2 or options.get("group", 1) != 1:
            continue
        values = numpy_helper.to_array(weight)
        axis = 1 if node.op_type == "Conv" or options.get("transB") else len(weight.dims) - 2
        if values.size >= LEAST_VALUES and (pattern := pattern_along(values, axis)):
            found[node.name] = pattern
    return found
