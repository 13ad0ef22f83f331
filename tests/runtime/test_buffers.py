from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.runtime.buffers import KEPT, KEPT_BYTES, Buffers


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_of_a_deleted_array() -> None:
    buffers = Buffers()
    first = buffers.take((2, 3))
    where = address(first)
    del first
    assert address(buffers.take((3, 2))) == where


def test_memory_of_a_view() -> None:
    buffers = Buffers()
    array = buffers.take((4, 4))
    array[:] = 7
    view = array[1:, ::2].T[0]
    where = address(array)
    del array
    other = buffers.take((4, 4))
    assert address(other) != where
    other[:] = 0
    assert (view == 7).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=40))
def test_live_arrays_share_no_memory(takes: list[tuple[int, bool]]) -> None:
    buffers, held = Buffers(), []
    for number, (size, keep) in enumerate(takes):
        array = buffers.take((size, 8))
        array[:] = number
        if keep:
            held.append((number, array))
    assert all((array == number).all() for number, array in held)
    assert len(buffers._free) <= KEPT


def test_threads_never_share_memory() -> None:
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for _ in range(300):
            array = buffers.take((64,))
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_reused_for_another_type() -> None:
    buffers = Buffers()
    where = address(buffers.take((8,)))
    labels = buffers.take((4, 8), np.uint8)
    assert (labels.dtype, labels.shape, address(labels)) == (np.uint8, (4, 8), where)


def test_limit_of_kept_bytes() -> None:
    """Memory that is never written is no memory: these arrays cost nothing."""
    buffers = Buffers()

    def kept() -> list[int]:
        return [memory.nbytes for memory in buffers._free]

    buffers.take((KEPT_BYTES + 1,), np.uint8)
    assert kept() == []
    half, part = KEPT_BYTES // 2, KEPT_BYTES // 8
    for size in (part, part, half):
        buffers.take((size,), np.uint8)
    assert kept() == [part, half]
    held = [buffers.take((size,), np.uint8) for size in (part, part, part, half)]
    del held
    assert sum(kept()) <= KEPT_BYTES
    buffers.take((KEPT_BYTES,), np.uint8)
    assert kept() == [KEPT_BYTES]
    buffers.take((part,), np.uint8)
    assert kept() == [part]  # the last ones count
